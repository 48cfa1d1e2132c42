"""The product that nominates candidates on a device; distances are evaluated elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows that share one minimum: candidates are whole groups. Neighboring locations are alike, so that a vector's rivals stand in
# its own group.
GROUP = 8
# How many times as many groups are nominated where those before did not settle it.
_MORE = 8
# float32 rounds each of the additions of a product by up to this share. On vectors that are constant they all err to one side,
# and a device may add one channel after the other: no smaller bound holds for every order.
_ROUNDING = 2.0**-24
# What the norms, the center and the last additions may add to it, in channels.
_MORE_CHANNELS = 8
# What float32 may lose of the lengths that bound a rounded product's error.
_OF_BOUNDS = 1 + 1e-5


class Nominations(NamedTuple):
    """What a product says of queries and a block.

    Attributes:
        nearest: (nq,) a squared distance that no vector of the block is below, rounding apart.
        candidates: nominates candidates. Its arguments are which queries (m,), and how often they were nominated for already:
            each time it nominates more, in the end all. It returns locations in the block (m, some), -1 for none, and (m,) the
            squared distance that every other location is at least at, rounding apart.
    """

    nearest: Tensor
    candidates: Callable[[Tensor, int], tuple[Tensor, Tensor]]


# Nominates for queries: their vectors less the center (nq, C), their squared norms (nq,), and kappa.
Nominate = Callable[[Tensor, Tensor, int], Nominations]


@dataclass(frozen=True)
class TorchProduct:
    """The product -2 q x + |x|^2 by torch, and its minima over groups of rows.

    Attributes:
        half: whether numbers are rounded to bfloat16, to q' and x'. What is lost is known, and taken off each group's minimum:
            |q x - q' x'| <= |q - q'| |x| + |q'| |x - x'|.
        margin: the share of that bound that is taken off; less than 1 is for tests, which show that less is not enough.
    """

    half: bool = False
    margin: float = 1.0

    def rounding(self, channels: int) -> float:
        """The share of |q|^2 + |x|^2 by which the squared distances may be off, for vectors of so many channels."""
        return _ROUNDING * (channels + _MORE_CHANNELS)

    def prepare(self, xb: Tensor) -> Nominate:
        """Prepare a block's vectors, less the center, (nb, C) float32."""
        nb, channels = xb.shape
        groups = -(-nb // GROUP)
        # Column j * groups + g is row g * GROUP + j: minima of groups are then of whole columns.
        padded = torch.nn.functional.pad(xb, (0, 0, 0, groups * GROUP - nb))
        spread = padded.view(groups, GROUP, channels).transpose(0, 1).reshape(-1, channels)
        norms = torch.nn.functional.pad(xb.square().sum(1), (0, groups * GROUP - nb), value=torch.inf)
        norms = norms.view(groups, GROUP).t().reshape(1, -1)
        members = torch.arange(GROUP, device=xb.device)
        bounds = self._bounds(spread, groups) if self.half else None

        def nominate(q: Tensor, norm: Tensor, kappa: int) -> Nominations:
            minima = self._multiply(norms, q, spread).view(len(q), GROUP, groups).amin(1)
            if bounds is not None:
                left = (q - q.bfloat16().float()).square().sum(1).sqrt()
                minima = torch.addmm(minima, torch.stack([left, norm.sqrt() + left], 1), bounds, alpha=-1)

            def candidates(which: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
                # The kappa nearest stand in as many groups at most; one more for rounding.
                listed = min((kappa + 1) * _MORE**attempt, groups)
                least, found = minima[which].topk(min(listed + 1, groups), largest=False)
                rows = (found[:, :listed, None] * GROUP + members).flatten(1)
                beyond = least[:, listed] + norm[which] if listed < groups else torch.full_like(least[:, 0], torch.inf)
                return rows.where(rows < nb, -1), beyond

            return Nominations(minima.amin(1) + norm, candidates)

        return nominate

    def _bounds(self, xb: Tensor, groups: int) -> Tensor:
        """(2, groups), twice the largest |x| and |x - x'| of each group: a query's error is at most its product with them."""
        lengths = [x.square().sum(1).sqrt().view(GROUP, groups).amax(0) for x in (xb, xb - xb.bfloat16().float())]
        return torch.stack(lengths) * (2 * _OF_BOUNDS * self.margin)

    def _multiply(self, norms: Tensor, q: Tensor, xb: Tensor) -> Tensor:
        if not self.half:
            return torch.addmm(norms, q, xb.t(), alpha=-2)
        q, xb = q.bfloat16(), xb.bfloat16()
        if q.device.type == "cuda":
            return torch.addmm(norms, q, xb.t(), torch.float32, alpha=-2)
        return torch.addmm(norms, q.float(), xb.float().t(), alpha=-2)  # the same factors, multiplied and summed in float32
