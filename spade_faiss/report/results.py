"""What `score_folder` and `evaluate` return."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spade_faiss.decisions.rules import Decisions
from spade_faiss.features.datasets import Duplicate, Skipped
from spade_faiss.features.folders import LeftOut, name_some
from spade_faiss.features.placement import Visible
from spade_faiss.report.products import ProductResult
from spade_faiss.scoring.evaluation import Metrics
from spade_faiss.scoring.routing import NONE_LEVEL


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a run over images; its files are in `out`.

    Args:
        out: the folder that the files were written to.
        images: the number of images that were scored.
        skipped: the images that could not be read, each with the reason.
        left_out: what else lies in the folders and was not scored.
        visible: how much of the images the resize mode shows.
        in_bank: the images whose content is in the bank, under the id `of`.
        metrics: the metrics of a labeled set; None without labels.
        decisions: the verdicts and regions; None if there are none, then `notice` says why.
        notice: why there are no decisions; empty if there are.
        passed_over: for each level whose search counts it, the share of the gallery's vectors that it ruled out without a look,
            mean over the images that were localized.
        timing_s: seconds of each step; steps that ran in other threads overlap.
        total_s: the wall-clock time up to the report.
        peak_memory_bytes: the most memory that the process has used since it started.
        products: of a bank of several products, what was found of each; empty for any other.
        few_images: that the bank has too few images for the usual number of neighbors; empty if it has enough.
    """

    out: Path
    images: int
    skipped: tuple[Skipped, ...]
    left_out: LeftOut
    visible: Visible
    in_bank: tuple[Duplicate, ...]
    metrics: Metrics | None
    decisions: Decisions | None
    notice: str
    passed_over: dict[str, float]
    timing_s: dict[str, float]
    total_s: float
    peak_memory_bytes: int
    products: tuple[ProductResult, ...] = ()
    few_images: str = ""

    def notices(self) -> list[str]:
        """What was not inspected, or not as it should be: sentences without their period."""
        few = [self.few_images] if self.few_images else []
        return [*self.left_out.notices(), *self.visible.notices(), *self._in_bank_notices(), *self._product_notices(), *few]

    def search_notice(self) -> str:
        """How much of the gallery was passed over: a sentence, empty where it is not counted."""
        if not self.passed_over:
            return ""
        shares = ", ".join(f"{100 * share:.1f} % at level {level}" for level, share in self.passed_over.items())
        return f"Passed over as too far to be nearest: {shares} of the gallery's vectors."

    def inspected_numbers(self) -> dict[str, Any]:
        """What `notices` says, and how many images were read, as plain values."""
        return {
            "images": self.images,
            "skipped": [asdict(item) for item in self.skipped],
            "left_out": self.left_out.numbers(),
            "visible": asdict(self.visible),
            "in_bank": [asdict(item) for item in self.in_bank],
            "few_images": self.few_images or None,
        }

    def _product_notices(self) -> list[str]:
        said = [] if self.decisions is None else self.decisions.rules.said
        if none := sum(item.none for item in self.products):
            said.append(
                f"{none} of {self.images} images seem to show none of the products (p-value of at most {NONE_LEVEL:g}, and as "
                f"far from all normals as products are from each other); each was searched in the one that is nearest"
            )
        return said

    def _in_bank_notices(self) -> list[str]:
        if not self.in_bank:
            return []
        names = name_some([item.id if item.id == item.of else f"{item.id} (there {item.of})" for item in self.in_bank])
        return [
            f"{len(self.in_bank)} of {self.images} images are in the bank by content: they find themselves there, and score "
            f"lower than new images do, down to 0: {names}"
        ]
