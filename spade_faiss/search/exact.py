"""Exact search of every location of the nearest normals; the engine depends on the machine, what is found does not."""

from __future__ import annotations

from dataclasses import dataclass, field

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_choice
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.engines.faiss import FaissSearch
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.native.extension import AUTO, SIMD_LEVELS, find_simd_level, usable_simd_level
from spade_faiss.search.protocol import SAME_SCORES, Encoded, GallerySearch, NoSettings, SearchMethod
from spade_faiss.search.workers import Workers

ENGINES = ("auto", "native", "faiss", "torch")
PRODUCTS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ExactQuery:
    """The engine, and how it multiplies.

    `engine` is `native` (the compiled kernel) or `faiss` on the CPU, or `torch` on the device; `auto` is `native` on the CPU
    where it runs, else `faiss`, and `torch` elsewhere. `simd_level` is the instruction set that `native` multiplies with.
    `product` is the type of the products that find candidates on a device, `float32` or `bfloat16`.
    """

    engine: str = field(default="auto", metadata=SAME_SCORES)
    simd_level: str = field(default=AUTO, metadata=SAME_SCORES)
    product: str = field(default="float32", metadata=SAME_SCORES)

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_choice("simd_level", self.simd_level, (AUTO, *SIMD_LEVELS))
        check_choice("product", self.product, PRODUCTS)
        if self.product != "float32" and self.engine in ("native", "faiss"):
            raise InputError(f"product={self.product!r} needs engine='torch', got engine={self.engine!r}")
        if self.simd_level != AUTO and self.engine not in ("auto", "native"):
            raise InputError(f"simd_level={self.simd_level!r} needs engine='native', got engine={self.engine!r}")


def open_on_cpu(blocks: Blocks, workers: Workers, simd_level: str = AUTO) -> NativeSearch | FaissSearch:
    """Open the fastest exact search that this processor runs."""
    channels = blocks.level.channels
    found = usable_simd_level(channels) if simd_level == AUTO else find_simd_level(simd_level, channels)
    return FaissSearch(blocks, workers) if found is None else NativeSearch(blocks, workers, found)


def _open(blocks: Blocks, workers: Workers, build: NoSettings, query: ExactQuery, encoded: Encoded | None) -> GallerySearch:
    on_cpu = workers.device.kind == "cpu"
    if query.engine == "native":
        return NativeSearch(blocks, workers, find_simd_level(query.simd_level, blocks.level.channels))
    if query.engine == "faiss":
        return FaissSearch(blocks, workers)
    if query.engine == "auto" and on_cpu:
        if query.product != "float32":
            raise InputError(f"product={query.product!r} needs a device, or engine='torch'")
        return open_on_cpu(blocks, workers, query.simd_level)
    # torch is imported only where it searches.
    from spade_faiss.search.engines.products import TorchProduct
    from spade_faiss.search.engines.torch import TorchSearch

    return TorchSearch(blocks, workers, workers.accelerator, TorchProduct(query.product == "bfloat16"))


METHOD = SearchMethod(
    definition="Every location is compared with every location of the nearest normal images: exact.",
    build=NoSettings,
    query=ExactQuery,
    open=_open,
    own_rois=True,
)
