"""What `--to` and SOURCE name: destinations and sources by their words on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.settings import Run
from spade_faiss.features.video_names import VIDEO_SUFFIXES, check_can_read, is_video
from spade_faiss.watch.arrivals import Source
from spade_faiss.watch.ledger import Ledger
from spade_faiss.watch.settings import WatchSettings
from spade_faiss.watch.sinks.folder import FolderSink
from spade_faiss.watch.sinks.mqtt import MqttSink
from spade_faiss.watch.sinks.server import ServerSink
from spade_faiss.watch.sinks.sink import Sink
from spade_faiss.watch.sinks.webhook import WebhookSink
from spade_faiss.watch.sources.camera import CameraSource, label_of
from spade_faiss.watch.sources.folder import FolderSource
from spade_faiss.watch.sources.video import VideoSource

_EXPECTED = "folder:OUT, webhook:URL, mqtt://HOST:PORT/TOPIC or server:http://HOST:PORT/BANK"
# A file of secrets is a line; more is a mistake.
_MOST_SECRET = 4096


@dataclass(frozen=True)
class Secrets:
    """Files that hold what destinations have to be told, each alone on a line.

    Args:
        webhook: what webhooks are signed with.
        mqtt: the password of the user that an MQTT address names.
        server: the token that a server lets in.
    """

    webhook: str | None = None
    mqtt: str | None = None
    server: str | None = None


def source_name(source: str) -> str:
    """What the ledger, verdicts and servers call a source: an absolute path, or an address without secrets."""
    return label_of(source) if _is_address(source) else str(Path(source).resolve())


def make_source(source: str, ledger: Ledger, run: Run, settings: WatchSettings, at_a_time: int) -> Source:
    """Make the source that a word names.

    Args:
        source: a folder, a video file or the address of a stream.
        ledger: knows what was scored.
        run: says which frames are taken.
        settings: how it is watched.
        at_a_time: how many pictures are scored together.

    Raises:
        NotFoundError: for a path that does not exist.
        InputError: for a file that is no video, or an address that cannot be read.
        DependencyError: for a package that is not installed.
    """
    if _is_address(source):
        return CameraSource(source, every=run.every, most=2 * at_a_time, once=settings.once)
    path = Path(source)
    if path.is_dir():
        return FolderSource(path, ledger, run, settings)
    if not path.exists():
        raise NotFoundError(f"{source!r} does not exist; give a folder, a video file, or the address of a stream")
    if not is_video(path.name):
        raise InputError(
            f"{source!r} is no folder and no video ({' '.join(VIDEO_SUFFIXES)}); score a picture with: spade-faiss score"
        )
    check_can_read(path)
    return VideoSource(path, ledger, run)


def make_sinks(words: Sequence[str], secrets: Secrets, source: str) -> list[Sink]:
    """Make the destinations that words name.

    Raises:
        InputError: for words that name none, or one twice, and for files of secrets that cannot be read.
        DependencyError: for a package that is not installed.
    """
    sinks: list[Sink] = [_make_sink(word, secrets, source) for word in words]
    names = [sink.name for sink in sinks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{twice[0]} is named twice; name each destination once")
    return sinks


def check_folders(source: str, words: Sequence[str], bank: Path | None) -> None:
    """Raise InputError for a destination that lies where pictures are read, or in a bank."""
    watched = None if _is_address(source) or not Path(source).is_dir() else Path(source).resolve()
    for word in words:
        if not word.startswith("folder:"):
            continue
        place = Path(word.removeprefix("folder:")).resolve()
        if watched is not None and place.is_relative_to(watched):
            raise InputError(f"{word} lies inside of {source}: what is written there would be scored; choose another folder")
        if bank is not None and place.is_relative_to(bank.resolve()):
            raise InputError(f"{word} lies inside of the bank {bank}; choose another folder")


def usual_state(words: Sequence[str]) -> Path | None:
    """Where the state is unless it is said: in the first folder that verdicts go to."""
    folders = [word.removeprefix("folder:") for word in words if word.startswith("folder:")]
    return Path(folders[0]) / ".spade-watch.db" if folders else None


def _is_address(source: str) -> bool:
    return "://" in source and not Path(source).exists()


def _make_sink(word: str, secrets: Secrets, source: str) -> Sink:
    kind, _, rest = word.partition(":")
    if kind == "folder" and rest:
        return FolderSink(Path(rest))
    if kind == "webhook" and urlsplit(rest).scheme in ("http", "https"):
        return WebhookSink(rest, read_secret(secrets.webhook))
    if kind in ("mqtt", "mqtts"):
        return MqttSink(word, read_secret(secrets.mqtt))
    if kind == "server" and urlsplit(rest).scheme in ("http", "https"):
        return ServerSink(rest, read_secret(secrets.server), source)
    raise InputError(f"{word!r} is no destination; give {_EXPECTED}")


def read_secret(path: str | None) -> str | None:
    """Read the secret that stands in a file; None without one.

    Raises:
        InputError: if it cannot be read, or is none.
    """
    if path is None:
        return None
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MOST_SECRET + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the secret in {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    secret = text.strip()
    if not secret or "\n" in secret or len(text) > _MOST_SECRET or not secret.isprintable():
        raise InputError(f"{path} holds no secret; write it alone on one line")
    return secret
