"""The settings of `watch`."""

from __future__ import annotations

from dataclasses import dataclass

from spade_faiss.core.declaring import setting
from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least, is_finite


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """How a source is watched."""

    once: bool = setting(False, "end when everything that is there was scored and delivered; a camera, when its stream ends")
    alarms_only: bool = setting(False, "send alarms alone to webhooks and MQTT; folders and servers get every picture")
    max_wait_ms: int = setting(
        50, "how long a picture waits for others, which are scored together with it, if they come in time", metavar="MS"
    )
    settle_s: float = setting(
        1.0, "a file of a folder is complete when its size and time have not changed for so long", metavar="SECONDS"
    )
    give_up_s: float = setting(
        30.0, "a file that cannot be read is skipped when it has not changed for so long", metavar="SECONDS"
    )
    rescan_s: float = setting(
        30.0, "look through the whole folder as often, for what the system did not report", metavar="SECONDS"
    )
    max_undelivered: int = setting(
        10_000, "stop scoring while a destination has so many verdicts to take; a camera's frames are dropped then", metavar="N"
    )
    drain_s: float = setting(10.0, "at the end, how long to wait for destinations that do not answer", metavar="SECONDS")

    def __post_init__(self) -> None:
        check_at_least("max_wait_ms", self.max_wait_ms, 0)
        check_at_least("max_undelivered", self.max_undelivered, 1)
        for name in ("settle_s", "give_up_s", "rescan_s", "drain_s"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise InputError(f"{name}={value!r} must be a number of seconds of 0 or more")
