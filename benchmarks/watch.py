"""Watching: a thousand pictures in bursts with two restarts in between, and how long a picture takes that comes alone.

    python -m benchmarks.watch --data DATA --out benchmarks/results

DATA holds mvtec_bottle. The pictures are copies of its test pictures; the bank is made by efficientnet_lite0 at 224 pixels,
with the preset spade.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser_of
from benchmarks.main_job import machine
from spade_faiss.watch.latency import latency_ms

PICTURES, BURST, ALONE = 1000, 100, 60
# Of pictures that come alone: so many a second.
_RATE = 2.0
_PATIENCE_S = 1800.0


class Hook:
    """A webhook that notes when each verdict came; it is busy at every tenth request."""

    def __init__(self) -> None:
        self.keys: Counter[str] = Counter()
        self.at: dict[str, float] = {}
        self.requests = 0
        self.lock = threading.Lock()
        self.url = ""

    def take(self, key: str, name: str) -> int:
        """Note a request; returns the status of the answer."""
        with self.lock:
            self.requests += 1
            if self.requests % 10 == 0:
                return 503
            self.keys[key] += 1
            self.at.setdefault(name, time.time())
            return 204


@contextmanager
def listening() -> Iterator[Hook]:
    """Run a webhook in a thread."""
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            """Take a verdict."""
            line = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(hook.take(self.headers["Idempotency-Key"], line["name"]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hook.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hook
        server.shutdown()


def command(*words: object) -> list[str]:
    """A command of this package as a process runs it."""
    return [sys.executable, "-m", "spade_faiss", *map(str, words), "--quiet"]


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The complete lines of a folder of verdicts."""
    path = out / "verdicts.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def wait_for(out: Path, count: int) -> None:
    """Wait until so many pictures have their line."""
    end = time.monotonic() + _PATIENCE_S
    while len(lines_of(out)) < count:
        if time.monotonic() > end:
            raise SystemExit(f"{len(lines_of(out))} of {count} pictures have a verdict after {_PATIENCE_S:g} s")
        time.sleep(0.1)


def put(pictures: Sequence[Path], folder: Path, first: int, count: int) -> None:
    """Copy pictures into a folder, each renamed into place."""
    for number, path in enumerate(islice(cycle(pictures), first, first + count), first):
        hidden = folder / f".{number}"
        shutil.copy(path, hidden)
        os.utime(hidden)
        hidden.rename(folder / f"{number:04}.png")


def bursts(pictures: Sequence[Path], bank: Path, scratch: Path) -> dict[str, Any]:
    """All pictures in bursts; the process is killed at 300 and ended at 600."""
    incoming, out = scratch / "in", scratch / "out"
    incoming.mkdir()
    with listening() as hook:
        words = command("watch", incoming, "--bank", bank, "--to", f"folder:{out}", "--to", f"webhook:{hook.url}")
        put(pictures, incoming, 0, 2 * BURST)
        written, stops, starts = 2 * BURST, [], 0
        for stop_at, number in ((300, signal.SIGKILL), (600, signal.SIGTERM), (PICTURES, signal.SIGTERM)):
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            starts += 1
            while written < min(PICTURES, stop_at + 2 * BURST):
                put(pictures, incoming, written, BURST)
                written += BURST
                time.sleep(1)
            wait_for(out, stop_at)
            if stop_at == PICTURES:
                end = time.monotonic() + 120
                while len(hook.keys) < PICTURES and time.monotonic() < end:
                    time.sleep(0.1)
            began = time.monotonic()
            process.send_signal(number)
            code = process.wait(120)
            stops.append({"signal": number.name, "code": code, "seconds": time.monotonic() - began})
    lines = lines_of(out)
    names = Counter(line["name"] for line in lines)
    return {
        "pictures": PICTURES,
        "bursts_of": BURST,
        "starts": starts,
        "stops": stops,
        "lines": len(lines),
        "lost": PICTURES - len(names),
        "doubled": sum(names.values()) - len(names),
        "webhook": {
            "requests": hook.requests,
            "lost": len({line["id"] for line in lines} - hook.keys.keys()),
            "sent_again": sum(hook.keys.values()) - len(hook.keys),
        },
    }


def throughput(pictures: Sequence[Path], bank: Path, scratch: Path) -> dict[str, Any]:
    """`watch --once` and `score` on the same folder, by turns; the seconds of the whole commands."""
    incoming = scratch / "folder"
    incoming.mkdir()
    put(pictures, incoming, 0, 300)
    seconds: dict[str, list[float]] = {"watch": [], "score": []}
    for turn in range(3):
        runs = {
            "watch": command("watch", incoming, "--bank", bank, "--to", f"folder:{scratch / f'watched{turn}'}", "--once"),
            "score": command("score", incoming, "--bank", bank, "--out", scratch / f"scored{turn}"),
        }
        for name, words in runs.items():
            began = time.perf_counter()
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"pictures": 300, "seconds": seconds, "times_of_score": medians["score"] / medians["watch"]}


def alone(pictures: Sequence[Path], bank: Path, scratch: Path) -> dict[str, Any]:
    """Pictures that come one by one: from the rename to the verdict at the webhook."""
    incoming, out = scratch / "alone", scratch / "alone_out"
    incoming.mkdir()
    with listening() as hook:
        words = command("watch", incoming, "--bank", bank, "--to", f"folder:{out}", "--to", f"webhook:{hook.url}")
        settle_s = 0.1
        process = subprocess.Popen([*words, "--settle-s", str(settle_s)], stdout=subprocess.DEVNULL)
        put(pictures, incoming, 0, 1)
        wait_for(out, 1)
        renamed: dict[str, float] = {}
        for number in range(1, ALONE + 1):
            time.sleep(1 / _RATE)
            put(pictures, incoming, number, 1)
            renamed[f"{number:04}.png"] = time.time()
        wait_for(out, ALONE + 1)
        end = time.monotonic() + 120
        while not renamed.keys() <= hook.at.keys() and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        process.wait(120)
    arrived = {line["name"]: line for line in lines_of(out)}
    assert renamed.keys() <= arrived.keys()
    taken = [hook.at[name] - at for name, at in renamed.items()]
    return {"pictures": ALONE, "a_second": _RATE, "settle_s": settle_s, "rename_to_webhook_ms": latency_ms(taken)}


def main() -> None:
    """Measure, and write watch.json."""
    arguments = parser_of(__doc__).parse_args()
    dataset = arguments.data / "mvtec_bottle"
    pictures = sorted((dataset / "test").rglob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bank = scratch / "bottle.bank"
        fit = command(
            "fit", dataset / "train" / "good", "--bank", bank, "--backbone", "efficientnet_lite0", "--preset", "spade"
        )
        subprocess.run(fit, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = {"machine": {**machine(), "load": os.getloadavg()[0]}}
        for name, measure in (("bursts", bursts), ("alone", alone), ("throughput", throughput)):
            found[name] = measure(pictures, bank, scratch)
            print(name, json.dumps(found[name]), flush=True)
            (arguments.out / "watch.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
