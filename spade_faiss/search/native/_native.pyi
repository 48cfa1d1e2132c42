from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_CHANNELS: int
SHADOW: int

def simd_levels() -> list[tuple[str, str]]: ...
def padded_length(simd_level: str, length: int, digits: bool = False) -> int: ...

class Packing:
    def __init__(
        self,
        simd_level: str,
        center: npt.NDArray[np.float32],
        basis: npt.NDArray[np.float32] | None = None,
        longest: float = 0.0,
    ) -> None: ...

class StoredCodes:
    def __init__(self, scale: npt.NDArray[np.float32], bits: npt.NDArray[np.uint8] | None = None) -> None: ...

class RowPack:
    def __init__(self, packing: Packing, vectors: npt.NDArray[Any], codes: StoredCodes | None = None) -> None: ...
    @property
    def nbytes(self) -> int: ...

class QueryPack:
    def __init__(self, packing: Packing, vectors: npt.NDArray[np.floating[Any]]) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Gallery:
    def __init__(self, height: int, width: int, parts: Sequence[tuple[object, ...]]) -> None: ...
    @property
    def count(self) -> int: ...
    def vectors(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def sq_distances(self, queries: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...

class Clusters:
    def __init__(
        self,
        simd_level: str,
        gallery: Gallery,
        centers: npt.NDArray[np.float32],
        cluster: npt.NDArray[np.int32],
        distance: npt.NDArray[np.float32],
    ) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def pack(self, first: int, last: int) -> None: ...
    def search_nearest(
        self, queries: npt.NDArray[np.float32], excluded: npt.NDArray[np.int64], k: int, margin: float = 1.0
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64], int]: ...
    def search(
        self,
        range: tuple[int, int],
        queries: npt.NDArray[np.float32],
        excluded: npt.NDArray[np.int64],
        bound: npt.NDArray[np.float32],
        seed: npt.NDArray[np.int32],
        k: int,
        margin: float = 1.0,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64], int]: ...

class Lists:
    def __init__(
        self,
        simd_level: str,
        gallery: Gallery,
        centroids: npt.NDArray[np.float32],
        groups: Sequence[tuple[npt.NDArray[Any], ...]],
    ) -> None: ...
    def search(
        self,
        queries: npt.NDArray[np.float32],
        projected: npt.NDArray[np.float32],
        allowed: Sequence[npt.NDArray[np.bool_]],
        nprobe: int,
        rerank: int,
        k: int,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int]: ...

def k_center(
    vectors: npt.NDArray[np.floating[Any]],
    count: int,
    first: int,
    shadows: npt.NDArray[np.float32],
    slack: float,
    threads: int = 1,
) -> tuple[npt.NDArray[np.int64], float]: ...
def resample(
    maps: npt.NDArray[np.float32],
    row_positions: npt.NDArray[np.int32],
    row_weights: npt.NDArray[np.float32],
    column_positions: npt.NDArray[np.int32],
    column_weights: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]: ...

class WindowCoding:
    def __init__(
        self,
        simd_level: str,
        center: npt.NDArray[np.float32],
        step: float,
        height: int,
        width: int,
        cells: Sequence[int] = (),
    ) -> None: ...

class WindowCodes:
    def __init__(
        self, coding: WindowCoding, gallery: Gallery, image: int, inside: npt.NDArray[np.bool_] | None = None
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

def most_window_code(simd_level: str) -> int: ...
def search_windows(
    gallery: Gallery,
    rows: npt.NDArray[np.int64],
    coding: WindowCoding,
    codes: Sequence[WindowCodes],
    wanted: npt.NDArray[np.bool_],
    queries: npt.NDArray[np.float32],
    range: tuple[int, int],
    radius: int,
    sq_dist: npt.NDArray[np.float32],
    id: npt.NDArray[np.int64],
    reach: npt.NDArray[np.int32] | None = None,
    margin: float = 1.0,
) -> None: ...
def search(
    query_pack: QueryPack,
    queries: npt.NDArray[np.float32],
    row_pack: RowPack,
    rows: npt.NDArray[Any],
    bound: npt.NDArray[np.float32],
    k: int,
    margin: float = 1.0,
    codes: StoredCodes | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int, int]: ...
def filter(query_pack: QueryPack, row_pack: RowPack) -> None: ...
