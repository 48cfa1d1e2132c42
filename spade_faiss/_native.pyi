from typing import Any

import numpy as np
import numpy.typing as npt

PANEL: int

def units() -> list[tuple[str, str]]: ...

class RowPack:
    def __init__(
        self,
        unit: str,
        vectors: npt.NDArray[np.floating[Any]],
        centre: npt.NDArray[np.float32],
        basis: npt.NDArray[np.float32] | None = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

class QueryPack:
    def __init__(
        self,
        unit: str,
        vectors: npt.NDArray[np.floating[Any]],
        centre: npt.NDArray[np.float32],
        basis: npt.NDArray[np.float32] | None = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

def search(
    unit: str,
    query_pack: QueryPack,
    queries: npt.NDArray[np.float32],
    row_pack: RowPack,
    rows: npt.NDArray[np.floating[Any]],
    bound: npt.NDArray[np.float32],
    k: int,
    margin: float = 1.0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int, int]: ...
def filter(unit: str, query_pack: QueryPack, row_pack: RowPack) -> None: ...
