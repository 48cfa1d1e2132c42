"""The command that scores pictures as they arrive: watch."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from spade_faiss.cli.options import (
    Commands,
    add_method,
    add_product,
    add_run,
    add_settings,
    open_detector,
    read_run,
    read_settings,
)
from spade_faiss.cli.streams import write_output
from spade_faiss.cli.text import Finding, to_json
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Decision
from spade_faiss.core.text import printable
from spade_faiss.watch.settings import WatchSettings

if TYPE_CHECKING:
    from spade_faiss.watch.judge import Judge
    from spade_faiss.watch.watch import Line, Watch, Watched

# How often people are told how things go.
_REPORT_S = 10.0


def register(commands: Commands) -> None:
    """Add the command of this module."""
    watch = commands.add(
        "watch",
        _watch,
        "score pictures as they arrive, from a folder, a video or a camera, and deliver the verdicts",
        "spade-faiss watch incoming/ --bank parts.bank --to folder:verdicts/",
    )
    watch.add_argument(
        "source", metavar="SOURCE", help="a folder, a video file, or the address of a stream, such as rtsp://..."
    )
    watch.add_argument("--bank", help="the bank's folder; it may be left out if all pictures go to servers, which score them")
    watch.add_argument(
        "--to",
        action="append",
        default=[],
        metavar="DEST",
        help="where verdicts go to: folder:OUT, webhook:URL, mqtt://HOST:PORT/TOPIC, server:http://HOST:PORT/BANK; may be "
        "repeated (default: they are printed alone)",
    )
    watch.add_argument(
        "--state",
        metavar="FILE",
        help="where it is remembered what was scored and delivered (default: in the first folder that verdicts go to)",
    )
    watch.add_argument("--secret-file", metavar="FILE", help="the secret that webhooks are signed with")
    watch.add_argument("--mqtt-password-file", metavar="FILE", help="the password of the user that an MQTT address names")
    watch.add_argument("--token-file", metavar="FILE", help="the token of servers")
    add_settings(watch, WatchSettings)
    add_settings(watch, Decision, only=("alpha",))
    add_product(watch)
    add_method(watch)
    add_run(watch, scores=True)


def _watch(arguments: argparse.Namespace) -> Finding:
    from spade_faiss.storage.url import is_url
    from spade_faiss.watch.destinations import Secrets, check_folders, make_sinks, make_source, source_name, usual_state
    from spade_faiss.watch.ledger import Ledger
    from spade_faiss.watch.watch import Watch, state_folder

    settings, run = read_settings(arguments, WatchSettings), read_run(arguments)
    name = source_name(arguments.source)
    is_here = arguments.bank is not None and not is_url(arguments.bank)
    check_folders(arguments.source, arguments.to, Path(arguments.bank) if is_here else None)
    secrets = Secrets(arguments.secret_file, arguments.mqtt_password_file, arguments.token_file)
    sinks = make_sinks(arguments.to, secrets, name)
    if arguments.bank is None and not (sinks and all(sink.wants_pictures for sink in sinks)):
        raise InputError("--bank is missing: it is needed unless all destinations are servers, which have their own")
    state = usual_state(arguments.to) if arguments.state is None else Path(arguments.state)
    if state is None and sinks:
        raise InputError(
            "--state is missing: give a file in which it is remembered what was delivered, so that it goes on there"
        )
    judge = None if arguments.bank is None else _open_judge(arguments)
    if settings.alarms_only and judge is not None and judge.rules is None:
        raise InputError(f"--alarms-only needs verdicts: {judge.notice}")
    ledger = Ledger(None if state is None else state_folder(state), name)
    try:
        source = make_source(arguments.source, ledger, run, settings, 16 if judge is None else judge.at_a_time)
        watch = Watch(name, source, judge, sinks, ledger, settings)
        report = _Report(watch, as_json=arguments.json, quiet=arguments.quiet)
        if judge is not None and judge.notice and not arguments.quiet:
            report.say(judge.notice)
        with _signals(watch.stopping), report.running():
            done = watch(report)
    finally:
        ledger.close()
    return _describe(done, state)


def _open_judge(arguments: argparse.Namespace) -> Judge:
    from spade_faiss.watch.judge import Judge

    # Each time anew: reading options may change them.
    return Judge(lambda: open_detector(argparse.Namespace(**vars(arguments))), read_settings(arguments, Decision))


class _Report:
    """Tells people of alarms and how things go, and programs of every picture."""

    def __init__(self, watch: Watch, *, as_json: bool, quiet: bool) -> None:
        self._watch = watch
        self._as_json = as_json
        self._quiet = quiet
        self._ended = threading.Event()

    def __call__(self, line: Line) -> None:
        if self._as_json:
            write_output(to_json(line.facts))
        elif line.skipped:
            write_output(printable(f"skipped {line.facts['name']}: {line.skipped}"))
        elif line.alarm:
            facts = line.facts
            write_output(printable(f"ALARM   {facts['name']}: p = {facts['p_value']:.3g}, {len(facts['regions'])} regions"))

    def say(self, text: str) -> None:
        sys.stderr.write(f"spade-faiss: {printable(text)}\n")
        sys.stderr.flush()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Say every now and then how many pictures were scored."""
        if self._quiet or self._as_json:
            yield
            return
        thread = threading.Thread(target=self._say_how_it_goes, name="report", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _say_how_it_goes(self) -> None:
        before, since = 0, time.monotonic()
        while not self._ended.wait(_REPORT_S):
            done, now = self._watch.done, time.monotonic()
            if done.scored == before:
                continue
            rate = (done.scored - before) / (now - since)
            text = f"{done.scored} scored ({rate:.1f} a second), {done.alarms} alarms, {done.skipped} skipped"
            self.say(text + (f", {done.dropped} dropped" if done.dropped else ""))
            before, since = done.scored, now


def _describe(done: Watched, state: Path | None) -> Finding:
    from spade_faiss.watch.latency import latency_ms

    waiting, refused = sum(done.waiting.values()), sum(done.refused.values())
    latency = latency_ms(done.latencies_s)
    numbers: dict[str, Any] = {
        "kind": "end",
        "scored": done.scored,
        "alarms": done.alarms,
        "skipped": done.skipped,
        "dropped": done.dropped,
        "delivered": done.delivered,
        "waiting": done.waiting,
        "refused": done.refused,
        "latency_ms": latency,
        "state": None if state is None else str(state),
    }
    lines = [f"{done.scored} scored, {done.alarms} alarms, {done.skipped} skipped"]
    lines += [f"  {done.dropped} frames came too fast and were dropped"] if done.dropped else []
    if latency:
        lines.append("  from arrival to verdict: " + ", ".join(f"{name} {value:.0f} ms" for name, value in latency.items()))
    for name, count in done.delivered.items():
        left = f", {done.waiting[name]} wait" if done.waiting[name] else ""
        left += f", {done.refused[name]} refused" if done.refused[name] else ""
        lines.append(f"  {name}: {count} delivered{left}")
    if waiting:
        lines.append(f"  what waits is in {state}; the same command delivers it")
    return Finding(numbers, lines, failed=bool(waiting or refused))


@contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """End in good order at the first SIGTERM, SIGINT or SIGHUP; the second one ends as it does elsewhere."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
