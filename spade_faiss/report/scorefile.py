"""`scores.h5`: the scores and maps of any number of images, written as a stream and read map by map.

The layout of `scores.h5`, for n images with k neighbors each and score maps of H x W pixels:

    /image_score (n,)  /map_score (n,)  /top_score (n,)  /peak (n, 2)  /neighbor_dist (n, k)  /maps (n, H, W)
    /match/<level> (n, 4): neighbor column, y, x and bank row of the location that the level's cell under the strongest
        pixel was matched to (column -1: of an image that is none of the neighbors; row -1: the image was not localized);
        its attribute `grid` is the (height, width) of the level
    Of images that were scored in tiles, /maps is a group: its arrays `0`, `1` ... are each of its image's own size, and its
        attribute `tile` is the (height, width) of a tile, in which the cells of /match lie
    /image_scores/structure (n,): if there was a calibration
    /product/name, in a bank of several products: bytes as /ids, and /product/confidence, p_none, none (n,), see `Routes`
    /verdict/p_image, p_map, p_top, p_structure, p_value (n,), alarm (n,): if there was a calibration; p-values are NaN
        where a product has none
    /regions/image (r,): the image of each of r regions; score, p_value (r,); and, with `input_` and `original_` before them,
        box (r, 4): x, y, width, height; area (r,); peak (r, 2): y, x; size (r, 2): height, width of the picture;
        counts: the run lengths of all masks, one mask after the other; runs (r,): how many of them each mask has
    /ids, /neighbor_ids: bytes, the n, or n * k, names in UTF-8, each followed by a NUL
    attributes: schema, distance, settings (JSON text), run (of the files that are of one run, each says so)

Files of versions before had no `top_score`, `image_scores`, `p_top` and `p_structure`.

Names are bytes because HDF5's text of variable length has no checksum, and one flipped bit in it can send HDF5 into an
endless loop; everything in this file has one, so damage is an error and never a different score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.process import usable_cores
from spade_faiss.core.types import FloatArray
from spade_faiss.report.packed_chunks import append_packed
from spade_faiss.scoring.routing import Routes
from spade_faiss.scoring.scores import Scores

SCHEMA = 2

IntArray = npt.NDArray[np.int64]

# The image scores, each a column.
_SCORES = ("image_score", "map_score", "top_score")
_STRUCTURE = "image_scores/structure"
_PRODUCT, _ROUTE, _NONE = "product/name", ("confidence", "p_none"), "product/none"
_ROWS = 1024  # rows a chunk, of everything but maps and names
_BYTES = 1 << 16  # bytes of names a chunk
_SIDE = 512  # rows and columns a chunk, of a map of an image that was scored in tiles
# Every HDF5 reader knows gzip, only h5py knows lzf.
_PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
_DAMAGE = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)  # what h5py raises on a damaged file


class _Form(NamedTuple):
    """The properties that all batches of a file have in common."""

    distance: str
    neighbors: int
    size: tuple[int, ...] | None
    levels: dict[str, tuple[int, ...]]
    has_products: bool

    @classmethod
    def of(cls, scores: Scores) -> _Form:
        n, k = len(scores), scores.neighbor_ids.shape[-1]
        shapes = [scores.image_score.shape, scores.neighbor_ids.shape, scores.neighbor_dist.shape, scores.maps.shape[:1]]
        if shapes != [(n,), (n, k), (n, k), (n,)] or any(len(nearest) != n for nearest in scores.nearest.values()):
            raise InputError(f"{n} ids do not fit image scores, neighbors and maps of shapes {shapes}")
        levels = {level: nearest.shape[1:] for level, nearest in scores.nearest.items()}
        # Images that were scored in tiles have maps of any size.
        size = None if scores.sizes is not None else scores.maps.shape[1:]
        return cls(scores.distance, k, size, levels, scores.routes is not None)


class ScoreWriter:
    """Writes `scores.h5` batch by batch in constant memory; the file appears when the `with` block ends well, and only then.

    Args:
        path: the file to make or replace; its folder exists.
        settings: JSON text that says how the images were scored; stored as it is.
        run: tells the run from all others.
        tile: (height, width) of the tiles that images are scored in; None for whole images.

    Raises:
        InputError: if `settings` is no JSON, or the block ended without a batch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: str = "{}",
        *,
        run: str = "",
        tile: tuple[int, int] | None = None,
    ) -> None:
        self._path = Path(path)
        self._run = run
        self._tile = tile
        try:
            json.loads(settings)
        except ValueError as error:
            raise InputError(f"the settings for {self._path} must be JSON text: {error}") from error
        self._settings = settings
        self._session: AbstractContextManager[None] | None = None
        self._file: Any = None
        self._form: _Form | None = None
        self._pool: ThreadPoolExecutor

    def __enter__(self) -> Self:
        self._session = self._write()
        self._session.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._session is not None
        self._session.__exit__(kind, error, trace)

    def append(self, scores: Scores) -> None:
        """Add the n images of `scores`; all batches have the same distance, neighbor count, map size and levels.

        Raises:
            InputError: if the batch does not fit the ones before it, or contradicts itself, or an id holds a NUL character.
        """
        if self._file is None:
            raise InputError(f"{self._path} is not open; use: with ScoreWriter(path) as writer: writer.append(scores)")
        form = _Form.of(scores)
        if (self._tile is None) != (form.size is not None):
            raise InputError(f"{self._path} is of {'tiles' if self._tile else 'whole images'}, these scores are not")
        ids, neighbor_ids = _encoded(scores.ids), _encoded(scores.neighbor_ids.ravel())
        if self._form is None:
            self._create(form)
            self._form = form
        for name, now, before in zip(form._fields, form, self._form, strict=True):
            if now != before:
                raise InputError(f"{self._path}: this batch has {name}={now}, the batches before it have {name}={before}")
        peak, size = scores.peak, self._tile or scores.maps.shape[1:]
        self._add("ids", ids)
        self._add("neighbor_ids", neighbor_ids)
        for name in (*_SCORES, "neighbor_dist"):
            self._add(name, getattr(scores, name))
        if self._tile is None:
            append_packed(self._file["maps"], scores.maps, self._pool)
        else:
            self._add_maps(scores)
        self._add("peak", peak)
        if (routes := scores.routes) is not None:
            self._add(_PRODUCT, _encoded(routes.product))
            for name in _ROUTE:
                self._add(f"product/{name}", getattr(routes, name))
            self._add(_NONE, routes.none.astype(np.uint8))
        cells = peak if scores.corners is None else peak - scores.corners
        for level, nearest in scores.nearest.items():
            self._add(f"match/{level}", match_at(cells, size, nearest))

    def add_table(self, group: str, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add a named group of arrays, such as the verdicts on all images; see `ScoreFile.table`."""
        if self._file is None:
            raise InputError(f"{self._path} is not open; use: with ScoreWriter(path) as writer: writer.add_table(...)")
        _add_table(self._file, group, columns)

    @contextmanager
    def _write(self) -> Iterator[None]:
        # From 1.10 on, HDF5 keeps checksums of its own structures: damage is noticed there, not read as something else.
        with (
            ThreadPoolExecutor(usable_cores(), "pack") as self._pool,
            atomic_path(self._path) as temporary,
            self._create_file(temporary) as self._file,
        ):
            yield
            if self._form is None:
                raise InputError(f"no scores for {self._path}: no batch was appended")
            settings = np.bytes_(self._settings.encode("utf-8", "backslashreplace"))
            self._file.attrs.update(schema=SCHEMA, distance=np.bytes_(self._form.distance.encode()), settings=settings)
            if self._run:
                self._file.attrs["run"] = np.bytes_(self._run.encode())

    @staticmethod
    def _create_file(path: Path) -> Any:
        # No chunk cache: on a full disk, writing fails here then, not unnoticed in a destructor that leaves a damaged file.
        return h5py.File(path, "w", libver=("v110", "v110"), rdcc_nbytes=0)

    def _create(self, form: _Form) -> None:
        k = form.neighbors
        for name in ("ids", "neighbor_ids"):
            self._new(name, (), np.uint8, chunk=_BYTES, **_PACKED)
        for name in _SCORES:
            self._new(name, (), np.float32)
        self._new("neighbor_dist", (k,), np.float32)
        self._new("peak", (2,), np.int64)
        if form.size is not None:
            self._new("maps", form.size, np.float32, chunk=1, **_PACKED)
        else:
            self._file.create_group("maps").attrs["tile"] = self._tile
        if form.has_products:
            self._new(_PRODUCT, (), np.uint8, chunk=_BYTES, **_PACKED)
            for name in _ROUTE:
                self._new(f"product/{name}", (), np.float64)
            self._new(_NONE, (), np.uint8)
        self._file.create_group("match", track_order=True)  # levels come back finest first, not by name
        for level, grid in form.levels.items():
            self._new(f"match/{level}", (4,), np.int32)
            self._file[f"match/{level}"].attrs["grid"] = grid

    def _new(self, name: str, shape: tuple[int, ...], dtype: Any, *, chunk: int = _ROWS, **packing: Any) -> None:
        _create(self._file, name, shape, dtype, chunk=chunk, **packing)

    def _add_maps(self, scores: Scores) -> None:
        """Add maps that are each of their own size."""
        group = self._file["maps"]
        for scored in scores.own_maps():
            chunks = tuple(min(side, _SIDE) for side in scored.shape)
            group.create_dataset(str(len(group)), data=scored, chunks=chunks, fletcher32=True, **_PACKED)

    def _add(self, name: str, rows: npt.NDArray[Any]) -> None:
        _extend(self._file[name], rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreFile:
    """An open `scores.h5`, to be closed or used in a `with`: all is in memory but the maps, which are read when asked for.

    Args:
        path: the file.
        ids: n image names.
        image_score: (n,); map_score: (n,), each map's maximum; peak: (n, 2), row and column of that maximum.
        top_score: (n,), the mean of each map's highest pixels; NaN in a file of a version that did not record it.
        structure_score: (n,); None if there was no calibration.
        neighbor_ids: (n, k), nearest first; neighbor_dist: (n, k).
        match: for each level, (n, 4): neighbor column, y, x, bank row of the location that the cell under the peak matched.
        grid: for each level, (height, width).
        size: (H, W) of the maps; of a tile, where images were scored in tiles: then each map is of its image's own size.
        distance: of all scores, `l2` or `squared_l2`.
        settings: the JSON text given to the writer.
        run: the run given to the writer; empty if there was none.
        routes: which product each image shows; None where the bank has none.
    """

    path: Path
    ids: tuple[str, ...]
    image_score: FloatArray
    map_score: FloatArray
    top_score: FloatArray
    structure_score: FloatArray | None
    peak: IntArray
    neighbor_ids: npt.NDArray[np.str_]
    neighbor_dist: FloatArray
    match: dict[str, npt.NDArray[np.int32]]
    grid: dict[str, tuple[int, ...]]
    size: tuple[int, ...]
    distance: str
    settings: str
    run: str
    routes: Routes | None
    _maps: Any

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ScoreFile:
        """Open the score file at `path`.

        Raises:
            NotFoundError: if there is no such file.
            InputError: if it is no score file, damaged, or of another schema version.
        """
        path = Path(path)
        if not path.exists():
            raise NotFoundError(f"there is no score file {path}")
        with _damage_named(path):
            file = h5py.File(path, "r")
            try:
                return cls._read(path, file)
            except BaseException:
                file.close()
                raise

    @classmethod
    def _read(cls, path: Path, file: Any) -> ScoreFile:
        if (schema := file.attrs.get("schema")) != SCHEMA:
            raise InputError(f"{path} has score file schema {schema}, this version reads {SCHEMA}; score the images again")
        levels, neighbor_dist, maps = file["match"], file["neighbor_dist"][...], file["maps"]
        result = cls(
            path=path,
            ids=tuple(_decoded(file["ids"])),
            **{name: file[name][...] for name in ("image_score", "map_score", "peak")},
            top_score=file["top_score"][...] if "top_score" in file else np.full(len(neighbor_dist), np.nan, np.float32),
            structure_score=file[_STRUCTURE][...] if _STRUCTURE in file else None,
            neighbor_dist=neighbor_dist,
            neighbor_ids=np.array(_decoded(file["neighbor_ids"]), dtype=np.str_).reshape(neighbor_dist.shape),
            match={level: dataset[...] for level, dataset in levels.items()},
            grid={level: tuple(map(int, dataset.attrs["grid"])) for level, dataset in levels.items()},
            size=tuple(map(int, maps.attrs["tile"])) if isinstance(maps, h5py.Group) else maps.shape[1:],
            distance=file.attrs["distance"].decode(),
            settings=file.attrs["settings"].decode(),
            run=file.attrs.get("run", b"").decode(),
            routes=_routes(file) if _PRODUCT in file else None,
            _maps=maps,
        )
        columns = [*result.image_scores.values(), result.peak, result.neighbor_ids, result.neighbor_dist, maps]
        if (routes := result.routes) is not None:
            columns += [routes.product, routes.confidence, routes.p_none, routes.none]
        if counts := {len(column) for column in [*columns, *result.match.values()]} - {len(result)}:
            raise ValueError(f"{len(result)} ids, but other columns hold {sorted(counts)}")
        return result

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_scores(self) -> dict[str, FloatArray]:
        """The (n,) image scores by their names in `IMAGE_SCORES`, those that there are."""
        found = {"knn": self.image_score, "max": self.map_score, "top": self.top_score}
        return found if self.structure_score is None else {**found, "structure": self.structure_score}

    @property
    def is_tiled(self) -> bool:
        """Whether images were scored in tiles."""
        return isinstance(self._maps, h5py.Group)

    @property
    def localized(self) -> npt.NDArray[np.bool_]:
        """(n,) which images have a map."""
        found: npt.NDArray[np.bool_] = np.isfinite(self.map_score)
        return found

    def map(self, i: int) -> FloatArray:
        """(H, W), the score map of image `i`; of its own size if it was scored in tiles."""
        if not 0 <= i < len(self):
            raise InputError(f"there is no map {i} in {self.path}: it holds {len(self)}")
        if not self._maps:
            raise InputError(f"{self.path} was closed; its maps can no longer be read")
        with _damage_named(self.path):
            scores: FloatArray = self._maps[str(i)][...] if self.is_tiled else self._maps[i]
            return scores

    def maps(self) -> Iterator[FloatArray]:
        """Every (H, W) score map in turn, one in memory at a time."""
        for i in range(len(self)):
            yield self.map(i)

    def table(self, group: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of `ScoreWriter.add_table`; empty if there are none."""
        with _damage_named(self.path):
            return {name: column[...] for name, column in self._maps.file.get(group, {}).items()}

    def files(self, folder: Path) -> Iterator[tuple[Path, ScoreFile, slice]]:
        """Each file of the scores, where the tables that belong to it are written, and which of the images are in it.

        Args:
            folder: where the tables of a single file are written.
        """
        yield folder, self, slice(0, len(self))

    def close(self) -> None:
        """Close the file; its maps can no longer be read."""
        self._maps.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def add_tables(path: Path, tables: Mapping[str, Mapping[str, npt.NDArray[Any]]]) -> None:
    """Add named groups of arrays to a file that is complete but for them, and that nobody reads yet: see `add_table`.

    Groups of these names that are there are replaced: whoever added them may have been lost before all files had theirs.

    Raises:
        InputError: if the file is damaged.
    """
    if not tables:
        return
    with _damage_named(path), h5py.File(path, "r+", libver=("v110", "v110"), rdcc_nbytes=0) as file:
        for group, columns in tables.items():
            if group in file:
                del file[group]
            _add_table(file, group, columns)


def _add_table(file: Any, group: str, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    for name, column in columns.items():
        _create(file, f"{group}/{name}", column.shape[1:], column.dtype)
        _extend(file[f"{group}/{name}"], column)


def _create(file: Any, name: str, shape: tuple[int, ...], dtype: Any, *, chunk: int = _ROWS, **packing: Any) -> None:
    chunks = (chunk, *(max(1, side) for side in shape))
    file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=chunks, fletcher32=True, **packing)


def _extend(dataset: Any, rows: npt.NDArray[Any]) -> None:
    start = len(dataset)
    dataset.resize(start + len(rows), axis=0)
    dataset[start:] = rows


def match_at(peak: IntArray, size: tuple[int, ...], nearest: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
    """What a level matched at the peaks of n maps: (n, 4) of the neighbor's column, the cell (y, x) in it, and its row.

    Args:
        peak: (n, 2) the peaks, in pixels of the backbone's input.
        size: the height and width of that.
        nearest: (n, h, w) the level's, see `Scores`.
    """
    n, *grid = nearest.shape
    y, x = (peak * grid // size).T
    found = nearest[np.arange(n), y, x]
    return np.stack([found["neighbor"], found["y"], found["x"], found["row"]], axis=1).astype(np.int32)


def _encoded(names: Iterable[str]) -> npt.NDArray[np.uint8]:
    # The name of a file that is no valid UTF-8 is text with lone surrogates; surrogateescape gives back the bytes it has.
    encoded = [str(name).encode("utf-8", "surrogateescape") for name in names]
    if nul := next((name for name in encoded if b"\0" in name), None):
        raise InputError(f"id {nul!r} holds a NUL character, which no file name does; score files cannot keep it")
    return np.frombuffer(b"".join(name + b"\0" for name in encoded), dtype=np.uint8)


def _decoded(dataset: Any) -> list[str]:
    *names, rest = dataset[...].tobytes().split(b"\0")
    if rest:
        raise ValueError(f"{dataset.name} ends in the middle of a name")
    return [name.decode("utf-8", "surrogateescape") for name in names]


def _routes(file: Any) -> Routes:
    numbers = {name: file[f"product/{name}"][...] for name in _ROUTE}
    none = file[_NONE][...].astype(np.bool_)
    return Routes(product=np.array(_decoded(file[_PRODUCT]), dtype=np.str_), none=none, **numbers)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged, or is no score file: {error}; score the images again") from error
