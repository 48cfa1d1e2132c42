"""What it takes to use a bank where it is needed, from deployment.json: each table beside what was aimed at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.pages.text import Figures, markdown_table

Row = Mapping[str, Any]

# What the project aims at.
COLD_S, COLD_CPU_S, COLD_BYTES = 1.5, 1.2, 350e6
ENVIRONMENT_BYTES = 650e6
WARM_TIMES, FOLDER_SHARE, FOLDER_MS, FIT_TIMES = 1.3, 0.85, 22, 1.1
_MB = 1e6
_PEER = "anomalib"


def aims(figures: Figures) -> str:
    """What was aimed at, what was found, and whether that reaches it."""
    lines: list[tuple[str, ...]] = []
    for row in _measured(figures, "cold"):
        if row["environment"] == "edge":
            found = (
                f"{row['wall_s']['median']:.2f} s, {row['cpu_s']['median']:.2f} s, {row['peak_bytes']['median'] / _MB:.0f} MB"
            )
            aim = f"{COLD_S} s by the clock, {COLD_CPU_S} s of the processor, {COLD_BYTES / _MB:.0f} MB"
            lines.append(("one picture, cold", _by(row), f"at most {aim}", found, _cold_verdict(row)))
    for row in _measured(figures, "environment"):
        if row["extras"] != "cpu":
            reached = _verdict({"size": row["bytes"] <= ENVIRONMENT_BYTES})
            aim, found = f"at most {ENVIRONMENT_BYTES / _MB:.0f} MB", f"{row['bytes'] / _MB:.0f} MB"
            lines.append(("environment", f"`[{row['extras']}]`", aim, found, reached))
    for row in _measured(figures, "warm"):
        reached, found = _warm_verdict(row), f"{row['times_bare']['median']:.2f} times"
        aim = f"at most {WARM_TIMES} times decoding and forward pass"
        lines.append(("one picture, warm", _by(row), aim, found, reached))
    for row in _measured(figures, "folder"):
        shares = [f"{row[of]['median']:.2f}" for of in ("of_slowest", "of_cores")]
        found = f"{shares[0]}; {shares[1]} of what the cores need for all stages"
        aim = f"{FOLDER_SHARE} of what the slowest stage alone allows"
        lines.append((f"folder, {row['set']}", _by(row), aim, found, _folder_verdict(row)))
        reached = _verdict({"ms": row["ms"]["median"] <= FOLDER_MS})
        lines.append(
            (f"folder, {row['set']}", _by(row), f"at most {FOLDER_MS} ms an image", f"{row['ms']['median']:.1f} ms", reached)
        )
    for row in _measured(figures, "fitting"):
        found = f"{row['times_forward']['median']:.2f} times; {row['times_both']['median']:.2f} times forward and decode"
        aim = f"at most {FIT_TIMES} times bare forward passes"
        lines.append((f"fit, {row['set']}", row["engine"], aim, found, _fit_verdict(row)))
    for name, reached in _beside_peers(figures).items():
        lines.append(("peers", "onnxruntime", f"ahead of PatchCore in {name}", "see below", reached))
    return markdown_table(("what", "by", "aim", "found", ""), lines)


def _beside_peers(figures: Figures) -> dict[str, str]:
    """Whether the first row of this project is ahead of all of the peers', for each column that was measured."""
    found = {}
    columns = {
        "ms_one": "the time of one picture",
        "ms_folder": "the time of a folder",
        "image_auroc": "image AUROC",
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO",
    }
    rows = [row for row in _measured(figures, "peers") if "ms_one" in row]
    for name, title in columns.items():
        values = {row["peer"]: _value(row[name]) for row in rows}
        ours = [value for peer, value in values.items() if not peer.startswith(_PEER)][:1]
        theirs = [value for peer, value in values.items() if peer.startswith(_PEER)]
        if ours and theirs:
            best = min(theirs) if name.startswith("ms") else max(theirs)
            is_ahead = ours[0] < best if name.startswith("ms") else ours[0] > best
            found[title] = "reached" if is_ahead else "equal" if ours[0] == best else "missed"
    return found


def _value(found: Any) -> float:
    return float(found["median"] if isinstance(found, dict) else round(found, 3))


def passes(figures: Figures) -> str:
    """Milliseconds an image of each engine, how many times as fast as torch, and how far features are from its own."""
    lines = [
        (
            row["backbone"],
            row["batch"],
            row["engine"],
            _ranged(row["ms"], 1),
            f"{row['fastest_ms']:.1f}",
            _ranged(row["times_torch"], 2),
            f"{row['difference']:.0e}" if row["difference"] else "0",
        )
        for row in _measured(figures, "passes")
    ]
    header = ("network", "batch", "engine", "ms an image", "fastest", "times as fast as torch", "difference")
    return _section(figures, "passes", header, lines)


def cold(figures: Figures) -> str:
    """Seconds, seconds of the processor, and memory of one picture in a new process."""
    lines = [
        (
            _by(row),
            row["environment"],
            _ranged(row["wall_s"], 2),
            _ranged(row["cpu_s"], 2),
            _ranged(row["peak_bytes"], 0, 1 / _MB),
            _cold_verdict(row),
        )
        for row in _measured(figures, "cold")
    ]
    aim = f"at most {COLD_S} s by the clock, {COLD_CPU_S} s of the processor, {COLD_BYTES / _MB:.0f} MB"
    return _section(
        figures, "cold", ("engine, preset", "environment", "seconds", "CPU seconds", "peak MB", f"aim: {aim}"), lines
    )


def environment(figures: Figures) -> str:
    """Megabytes on disk of new environments."""
    lines = [
        (
            f"`[{row['extras']}]`" + (" and `faiss-cpu`" if row["extras"] == "openvino" else ""),
            f"{row['bytes'] / _MB:.0f}",
            f"{row['empty_bytes'] / _MB:.0f}",
            ", ".join(f"{name} {size / _MB:.0f}" for name, size in list(row["largest"].items())[:5]),
            _verdict({"size": row["bytes"] <= ENVIRONMENT_BYTES}) if row["extras"] != "cpu" else "–",
        )
        for row in _measured(figures, "environment")
    ]
    aim = f"aim: at most {ENVIRONMENT_BYTES / _MB:.0f} MB"
    return _section(figures, "environment", ("installed", "MB", "of these pip and Python", "largest, MB", aim), lines)


def warm(figures: Figures) -> str:
    """Milliseconds of one picture after the other, beside its bare work."""
    lines = [
        (
            _by(row),
            *(f"{row['score'][part]['median']:.1f}" for part in ("p50", "p95")),
            *(f"{row[name]['p50']['median']:.1f}" for name in ("decode", "forward")),
            _ranged(row["times_bare"], 2),
            _ranged(row["times_bare_p95"], 2),
            ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items() if ms >= 0.5),
            _warm_verdict(row),
        )
        for row in _measured(figures, "warm")
    ]
    header = ("engine, preset", "p50 ms", "p95 ms", "decode ms", "forward ms", "times both", "the same, p95", "stages, mean ms")
    return _section(figures, "warm", (*header, f"aim: at most {WARM_TIMES}"), lines)


def folder(figures: Figures) -> str:
    """Milliseconds an image of a folder, each stage alone, and the shares of two bounds that are reached."""
    lines = []
    for row in _measured(figures, "folder"):
        alone = {name: 1000 * cost["wall_s"]["median"] / row["images"] for name, cost in row["alone"].items()}
        lines.append(
            (
                f"{row['set']} ({row['images']})",
                _by(row),
                _ranged(row["ms"], 1),
                *(f"{ms:.1f}" for ms in alone.values()),
                row["slowest"],
                _ranged(row["of_slowest"], 2),
                _ranged(row["cores_s"], 1, 1000 / row["images"]),
                _ranged(row["of_cores"], 2),
                _folder_verdict(row),
            )
        )
    header = (
        "pictures",
        "engine, preset",
        "whole, ms an image",
        "decode",
        "forward",
        "search",
        "write",
        "slowest",
        "share of it",
    )
    rest = ("what the cores need, ms an image", "share of that", f"aim: {FOLDER_SHARE} of the slowest")
    return _section(figures, "folder", (*header, *rest), lines)


def fitting(figures: Figures) -> str:
    """Seconds of an extraction, beside bare forward passes and decoding."""
    lines = [
        (
            f"{row['set']} ({row['images']})",
            row["engine"],
            *(_ranged(row[part]["wall_s"], 2) for part in ("extract", "forward", "decode")),
            _ranged(row["times_forward"], 2),
            _ranged(row["times_both"], 2),
            _fit_verdict(row),
        )
        for row in _measured(figures, "fitting")
    ]
    header = ("pictures", "engine", "extract s", "forward s", "decode s", "times forward", "times forward and decode")
    return _section(figures, "fitting", (*header, f"aim: at most {FIT_TIMES} forward"), lines)


def peers(figures: Figures) -> str:
    """Whole jobs of this project and of others, and what was left out."""
    rows = list(_measured(figures, "peers"))
    lines = [
        (
            row["peer"],
            _ranged(row["ms_one"], 1),
            _ranged(row["times_own_one"], 2),
            _ranged(row["ms_folder"], 1),
            _ranged(row["times_own_folder"], 2),
            _ranged(row["open_s"], 1),
            *_process(row)[1:],
            *(f"{row[metric]:.3f}" for metric in ("image_auroc", "pixel_auroc", "aupro")),
        )
        for row in rows
        if "ms_one" in row
    ]
    header = ("score", "ms, one picture", "times ours", "ms a picture, folder", "times ours", "first picture, s", "peak MB")
    table = _section(figures, "peers", (*header, "image AUROC", "pixel AUROC", "AUPRO"), lines)
    sizes = {row["peer"]: row["environment_bytes"] for row in rows if "environment_bytes" in row}
    notes = [f"The environment of {name} takes {size / _MB:.0f} MB." for name, size in sizes.items()]
    return "\n\n".join([table, *notes])


def peer_fits(figures: Figures) -> str:
    """Seconds to fit by this project and by others."""
    lines = [
        (row["peer"], _ranged(row["fit_s"], 1), *_process(row), len(row["fit_s"]["runs"]))
        for row in _measured(figures, "peer_fits")
    ]
    return _section(figures, "peer_fits", ("fit", "seconds", "CPU seconds of the process", "peak MB", "runs"), lines)


def decoders(figures: Figures) -> str:
    """Milliseconds to decode a picture, and whether the pixels are the same."""
    lines = [
        (
            f"{row['file']} ({row['side']} px)",
            row["decoder"],
            _ranged(row["decode_ms"], 1),
            _ranged(row["ms"], 1),
            _ranged(row["times_pillow"], 2),
            "yes" if row["equal_pixels"] else "no",
            row["largest_difference"],
        )
        for row in _measured(figures, "decoders")
    ]
    header = ("file", "decoder", "decode ms", "with resize ms", "times as fast as Pillow", "equal pixels", "largest difference")
    return _section(figures, "decoders", header, lines)


def equality(figures: Figures) -> str:
    """Verdicts that engines change, and by how much they change scores."""
    lines = [
        (
            f"`{row['recipe']}`",
            row["engine"],
            f"{row['other_verdicts']} of {row['images']}",
            f"{row['image_score']:.0e}",
            f"{row['map_score']:.0e}",
        )
        for row in _measured(figures, "equality")
    ]
    header = ("recipe", "engine, beside torch", "other verdicts", "image scores differ by", "map maxima differ by")
    return _section(figures, "equality", header, lines)


_NOT_MEASURED = "Not measured yet."


def _rows(figures: Figures, section: str) -> Iterable[Row]:
    rows: Iterable[Row] = figures["deployment"].get(section, {"rows": ()})["rows"]
    return rows


def _measured(figures: Figures, section: str) -> Iterable[Row]:
    return (row for row in _rows(figures, section) if "not_measured" not in row)


def _section(figures: Figures, section: str, header: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    """A table, what it was measured on, and why something is not in it."""
    if section not in figures["deployment"]:
        return _NOT_MEASURED
    left_out = [row for row in _rows(figures, section) if "not_measured" in row]
    notes = dict.fromkeys(f"Not measured: {_subject(row)}; {row['not_measured']}." for row in left_out)
    return "\n\n".join([markdown_table(header, lines), *notes, _machine(figures["deployment"][section])])


def _subject(row: Row) -> str:
    """What a row is about: the first of its fields."""
    return str(next(value for name, value in row.items() if name not in ("file", "not_measured")))


def _process(row: Row) -> tuple[str, str]:
    return _ranged(row["process"]["cpu_s"], 1), _ranged(row["process"]["peak_bytes"], 0, 1 / _MB)


def _by(row: Row) -> str:
    """The engine and the preset; `spade` was the only one once."""
    return f"{row['engine']}, `{row.get('preset', 'spade')}`"


def _ranged(found: Row, digits: int, scale: float = 1.0) -> str:
    """A median, and the range of the runs in brackets."""
    median, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}–{high})" if low != high else median


def _cold_verdict(row: Row) -> str:
    limits = {"clock": ("wall_s", COLD_S), "CPU": ("cpu_s", COLD_CPU_S), "memory": ("peak_bytes", COLD_BYTES)}
    return _verdict({name: row[field]["median"] <= limit for name, (field, limit) in limits.items()})


def _warm_verdict(row: Row) -> str:
    return _verdict({"ratio": row["times_bare"]["median"] <= WARM_TIMES})


def _folder_verdict(row: Row) -> str:
    return _verdict({"share": row["of_slowest"]["median"] >= FOLDER_SHARE})


def _fit_verdict(row: Row) -> str:
    return _verdict({"ratio": row["times_forward"]["median"] <= FIT_TIMES})


def _verdict(reached: Mapping[str, bool]) -> str:
    """Whether an aim is reached, and if not, what of it is not."""
    missed = [name for name, is_reached in reached.items() if not is_reached]
    if not missed:
        return "reached"
    return "missed" if len(missed) == len(reached) else f"missed: {', '.join(missed)}"


def _machine(found: Row) -> str:
    machine, cores = found["machine"], found["machine"]["cores"]
    load = f"the load was {found['load_before']:.1f} before it and {found['load_after']:.1f} after it, on {cores} cores"
    # The load after it is also that of what was measured, whose stages have more threads than there are cores.
    disturbed = found["load_before"] > 1
    said = "others disturbed this measurement" if disturbed else "the machine was left alone"
    return f"Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads; {load}: {said}."
