"""Promised and observed false-alarm rates on real sets and in a simulation, and the cost of a calibration.

Run as `python -m benchmarks.calibration --data FOLDER --out benchmarks/results`, FOLDER holding `mvtec_bottle` and
`magnetic_tile`; ELPV comes from the package elpv-dataset. Features are extracted once; each split draws a new
bank, calibration and test images from the normal ones.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.arguments import parser_of
from benchmarks.datasets import write_elpv
from benchmarks.main_job import cli, machine, script
from spade_faiss import Bank, Detector, FeatureBatch, Level
from spade_faiss.bank.origin import Origin
from spade_faiss.core.extraction import Extraction
from spade_faiss.core.settings import Method
from spade_faiss.decisions.calibration import Calibration
from spade_faiss.decisions.conformal import alarms, rate_interval
from spade_faiss.features.layout import Layout
from spade_faiss.scoring.scores import Scores
from spade_faiss.workflows.calibrate import calibrate
from spade_faiss.workflows.extract import extract

PROMISED = (0.01, 0.02, 0.05, 0.1)
SPLITS = 20
DEFECTIVE = 100
# Images in bank, calibration and test; together at most the normal ones of the set.
SIZES = {"mvtec_bottle": (100, 100, 29), "magnetic_tile": (200, 200, 100), "elpv": (200, 200, 100)}
# The sets that have a split into training and test images. Their training images are cut into runs of RUN consecutive ones;
# one of HELD_OUT_RUN runs is held out.
OFFICIAL = ("mvtec_bottle", "magnetic_tile")
RUN, HELD_OUT_RUN = 8, 5
# The set that has several exposures of each part, `exp<1 to 6>_num_<frame>.jpg`: a part's frames are close to each other, and
# its exposures are in order.
EXPOSURES, LONGEST_GAP = "magnetic_tile", 200

REPETITIONS = 200
BANK_SIZES = (25, 50, 100, 200)
HELD_OUT, TESTED, OUTLIERS = 199, 90, 10
FDR = 0.1
LEVELS = (Level("fine", channels=4, stride=2, height=8, width=8), Level("coarse", channels=8, stride=4, height=4, width=4))
SIDE, DIM = 16, 16

COST_BANK = 5000
COST_SAMPLES = (200, 1000)

Figures = dict[str, Any]
Ints = npt.NDArray[np.int64]


def main() -> None:
    """Measure everything, or what --only names, and write calibration.json; other figures in it stay as they are."""
    parser = parser_of(__doc__, FIGURES)
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--cost-bank", type=int, default=COST_BANK)
    arguments = parser.parse_args()
    target = arguments.out / "calibration.json"
    figures: Figures = json.loads(target.read_bytes()) if target.exists() else {}
    figures["machine"] = machine()
    seconds = figures.setdefault("took_s", {})
    for name in arguments.only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            if name == "rates":
                figures[name] = rates(arguments.data, Path(scratch), arguments.splits)
            elif name == "official":
                figures[name] = official(arguments.data, Path(scratch))
            elif name == "simulation":
                figures[name] = simulation(Path(scratch), arguments.repetitions)
            else:
                figures[name] = cost(Path(scratch), arguments.cost_bank)
        seconds[name] = time.perf_counter() - start
        arguments.out.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{name} took {seconds[name]:.0f} s; wrote {target}", flush=True)


FIGURES = ("rates", "official", "simulation", "cost")


@dataclass(eq=False)
class Tally:
    """Counts of alarms at each promised rate, over splits."""

    normal: list[list[int]] = field(default_factory=list)
    defective: list[list[int]] = field(default_factory=list)
    totals: tuple[int, int] = (0, 0)

    def add(self, p_normal: npt.NDArray[np.float64], p_defective: npt.NDArray[np.float64]) -> None:
        """Count the alarms of one split."""
        self.normal.append([int(alarms(p_normal, alpha=alpha).sum()) for alpha in PROMISED])
        self.defective.append([int(alarms(p_defective, alpha=alpha).sum()) for alpha in PROMISED])
        self.totals = self.totals[0] + len(p_normal), self.totals[1] + len(p_defective)

    def rows(self) -> Iterator[Figures]:
        """A row for each promised rate: pooled rates with 95 % binomial intervals, and the false alarms of each split."""
        found = {
            "false_alarms": (np.array(self.normal), self.totals[0]),
            "detected": (np.array(self.defective), self.totals[1]),
        }
        for place, alpha in enumerate(PROMISED):
            row: Figures = {"alpha": alpha}
            for name, (counts, total) in found.items():
                count = int(counts[:, place].sum())
                row[name] = {"count": count, "of": total, "rate": count / total, "interval": rate_interval(count, total)}
            each = found["false_alarms"][0][:, place] * len(self.normal) / self.totals[0]
            yield {**row, "false_alarms_by_split": each.tolist()}


def rates(data: Path, scratch: Path, splits: int) -> list[Figures]:
    """Promised and observed rates on real sets, over random splits of their normal images."""
    rows = []
    for name, sizes in SIZES.items():
        folder = data / name
        if name == "elpv":
            write_elpv(folder := scratch / "elpv")
        every = _extract(folder, scratch / f"{name}.bank")
        normal = np.array([row for row, image in enumerate(every.ids) if _kind(image) == "good"])
        defective = np.setdiff1d(np.arange(len(every)), normal)
        tallies: dict[tuple[str, str], Tally] = {}
        for split in range(splits):
            rng = np.random.default_rng([len(every), split])
            drawn = rng.permutation(normal)[: sum(sizes)]
            bank_rows, held_out, tested = np.split(drawn, np.cumsum(sizes[:2]))
            detector = Detector.open(_sub_bank(every, bank_rows, scratch / "split.bank"))
            scores = detector.score_features(_read(every, np.concatenate([tested, rng.permutation(defective)[:DEFECTIVE]])))
            for mode, calibration in {
                "split": calibrate(detector, holdout=_read(every, held_out)),
                "leave_one_out": calibrate(detector, sample=len(bank_rows)),
            }.items():
                for test, p in _p_values(calibration, scores).items():
                    tallies.setdefault((mode, test), Tally()).add(p[: len(tested)], p[len(tested) :])
        for (mode, test), tally in tallies.items():
            of = {"set": name, "mode": mode, "test": test, "bank": sizes[0], "calibration": sizes[int(mode == "split")]}
            rows += [{**of, "splits": splits, **row} for row in tally.rows()]
        print(f"{name}: {splits} splits of {len(normal)} normal and {len(defective)} defective images", flush=True)
    return rows


def official(data: Path, scratch: Path) -> list[Figures]:
    """Rates on the test images of a set, calibrated on its training images: by leaving one out, or holding out whole runs.

    The test images of magnetic_tile show other tiles than its training images, so the images are not exchangeable: an image
    that is left out has others of its own tile in the bank, a held-out run of consecutive numbers has none. Where the bank is
    told which images are of one tile (`group_by`), they are left out together.
    """
    rows = []
    for name in OFFICIAL:
        every = sorted((data / name / "train" / "good").iterdir(), key=number_of)
        held_out = [path for place, path in enumerate(every) if place // RUN % HELD_OUT_RUN == 0]
        for mode in ("leave_one_out", "split", *(["groups"] if name == EXPOSURES else [])):
            bank, out = scratch / f"{name}-{mode}.bank", scratch / f"{name}-{mode}"
            images = [path for path in every if path not in held_out] if mode == "split" else every
            groups = ["--group-by", write_exposures(every, scratch / "groups.csv")] if mode == "groups" else []
            cli("fit", *images, "--bank", bank, "--backbone", "efficientnet_lite0", "--preset", "spade", *groups)
            if mode == "split":
                cli("calibrate", bank, "--holdout", *held_out)
            cli("evaluate", data / name, "--bank", bank, "--out", out, "--shown", "0")
            found = json.loads((out / "report.json").read_bytes())["calibration"]
            of = {"set": name, "mode": mode, "bank": len(images), "calibration": found["images"]}
            rows += [{**of, **row} for row in found["achieved"]]
    return rows


def write_exposures(every: list[Path], table: Path, prefix: str = "") -> Path:
    """Write which images are exposures of one tile, as far as their names and numbers tell; returns the table.

    Ids are names of files, after a prefix.
    """
    lines, tile, before = ["id,group"], 0, (0, 0)
    for path in every:
        exposure, number = int(re.findall(r"exp(\d+)", path.stem)[0]), number_of(path)
        if exposure <= before[0] or number - before[1] > LONGEST_GAP:
            tile += 1
        lines.append(f"{prefix}{path.name},{tile}")
        before = exposure, number
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def simulation(scratch: Path, repetitions: int) -> Figures:
    """On exchangeable features, the observed rates by mode, test and bank size, and the false discoveries under `fdr`."""
    tallies: dict[tuple[str, int, str], list[npt.NDArray[np.int64]]] = {}
    first: dict[tuple[str, int, str], list[npt.NDArray[np.bool_]]] = {}
    false_share, found_share = [], []
    for repetition in range(repetitions):
        rng = np.random.default_rng([7, repetition])
        for size in BANK_SIZES:
            bank = Bank.create(
                _empty(scratch / "simulated.bank"),
                Layout(levels=LEVELS, embedding_dim=DIM, input_size=(SIDE, SIDE), dtype="float32"),
            )
            bank.append(_features(rng, size, "normal"))
            detector = Detector.open(bank.path, method=Method(sigma=1))
            tested = detector.score_features(_features(rng, TESTED + OUTLIERS, "tested", OUTLIERS))
            modes = {"leave_one_out": calibrate(detector, sample=size)}
            if size == 100:
                modes["split"] = calibrate(detector, holdout=_features(rng, HELD_OUT, "held out"))
                verdicts = modes["split"].decide(tested.image_scores, fdr=FDR)
                false = int(verdicts.alarm[:TESTED].sum())
                false_share.append(false / max(1, int(verdicts.alarm.sum())))
                found_share.append(verdicts.alarm[TESTED:].mean())
            for mode, calibration in modes.items():
                for test, p in _p_values(calibration, tested).items():
                    passed = np.array([alarms(p[:TESTED], alpha=alpha) for alpha in PROMISED])
                    tallies.setdefault((mode, size, test), []).append(passed.sum(axis=1))
                    first.setdefault((mode, size, test), []).append(passed[:, 0])
    rows = []
    for (mode, size, test), counts in tallies.items():
        of, n = np.array(counts), HELD_OUT if mode == "split" else size
        alone = np.array(first[mode, size, test]).sum(axis=0)
        for place, alpha in enumerate(PROMISED):
            if alpha * (n + 1) < 1 - 1e-9:
                continue
            each = of[:, place] / TESTED
            error = float(each.std(ddof=1) / repetitions**0.5)
            rows.append(
                {
                    "mode": mode,
                    "bank": size,
                    "calibration": n,
                    "test": test,
                    "alpha": alpha,
                    "rate": float(each.mean()),
                    "interval": [float(each.mean() - 1.96 * error), float(each.mean() + 1.96 * error)],
                    # One test image of each repetition: independent of each other, hence binomial.
                    "first": {
                        "count": int(alone[place]),
                        "of": repetitions,
                        "interval": rate_interval(int(alone[place]), repetitions),
                    },
                }
            )
    fdr = {
        "asked": FDR,
        "false_share": float(np.mean(false_share)),
        "false_share_error": float(np.std(false_share, ddof=1) / repetitions**0.5),
        "found": float(np.mean(found_share)),
        "normal": TESTED,
        "outliers": OUTLIERS,
        "calibration": HELD_OUT,
    }
    return {"repetitions": repetitions, "tested": TESTED, "rows": rows, "fdr": fdr}


def cost(scratch: Path, normals: int) -> list[Figures]:
    """Seconds and peak memory of `calibrate` over a bank of efficientnet_lite0's shapes."""
    bank = scratch / "large.bank"
    script(
        f"""
        from pathlib import Path
        from benchmarks.features import SHAPES, Product, write_bank
        write_bank(Path({str(bank)!r}), Product(SHAPES["lite0"]), {normals})
        print("{{}}")
        """
    )
    rows = []
    for sample in COST_SAMPLES:
        found = script(
            f"""
            import json, resource, time
            from spade_faiss import Detector, Run
            from spade_faiss.workflows.calibrate import calibrate
            def peak():
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            detector = Detector.open({str(bank)!r}, run=Run(memory="1GiB"))
            before, start = peak(), time.perf_counter()
            made = calibrate(detector, sample={sample})
            print(json.dumps(dict(total_s=time.perf_counter() - start, start_bytes=before, peak_bytes=peak(), n=len(made))))
            """
        )
        rows.append({"normals": normals, "sample": sample, "memory": "1GiB", **found})
        print(rows[-1], flush=True)
    return rows


def _extract(dataset: Path, bank: Path) -> Bank:
    """A bank of all images of a set, normal and defective."""
    names = ("train", "test")
    return extract(
        [dataset / name for name in names], bank=bank, extraction=Extraction(backbone="efficientnet_lite0"), preset="spade"
    ).bank


def _kind(image: str) -> str:
    return Path(image).parent.name


def number_of(path: Path) -> int:
    """The order in which images were taken: the last number in their names."""
    return int(re.findall(r"\d+", path.stem)[-1])


def _read(every: Bank, rows: Ints) -> FeatureBatch:
    return every.read(rows)


def _sub_bank(every: Bank, rows: Ints, path: Path) -> Path:
    layout, source = every.layout, every.manifest.source
    bank = Bank.open_or_create(_empty(path), layout, Origin(source=source))
    bank.append(_read(every, np.sort(rows)))
    return bank.path


def _empty(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def _p_values(calibration: Calibration, scores: Scores) -> dict[str, npt.NDArray[np.float64]]:
    """P-values by test: each alone, and both together."""
    found = calibration.decide(scores.image_scores, alpha=0.5)
    return {"image": found.p_image, "map": found.p_map, "both": found.p_value}


def _features(rng: np.random.Generator, count: int, kind: str, outliers: int = 0) -> FeatureBatch:
    """Features that differ in a few factors, which embeddings and maps share; those of the last `outliers` ones are shifted."""
    factors = rng.normal(size=(count, 4))
    moved = np.zeros(count)
    moved[count - outliers :] = 3.0 if outliers else 0.0
    mixing = np.random.default_rng(1)
    embedding = factors @ mixing.normal(size=(4, DIM)) + 0.5 * rng.normal(size=(count, DIM)) + moved[:, None]
    levels = {}
    for level in LEVELS:
        shared = factors @ mixing.normal(size=(4, level.height * level.width * level.channels))
        maps = shared.reshape(count, *level.shape) + 0.5 * rng.normal(size=(count, *level.shape))
        maps[:, : level.height // 2, : level.width // 2] += moved[:, None, None, None]
        levels[level.name] = maps.astype(np.float32)
    names = [f"{kind} {number}" for number in range(count)]
    return FeatureBatch(names, embedding.astype(np.float32), levels)


if __name__ == "__main__":
    main()
