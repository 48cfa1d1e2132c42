"""FAISS index files, which may come from anybody: read only as what the recipe's factory makes, and compared with it first.

FAISS interprets a file as the file says: one with lists on disk names another file, which FAISS opens when it reads the index,
and writes to when vectors are added. So a file may hold only those four-letter codes, by which FAISS tells one type from
another, that an empty index of the same factory string has, and no vector may be longer than the file.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.inside import open_regular
from spade_faiss.core.process import PerProcess
from spade_faiss.core.schema import shorten
from spade_faiss.search.distances import import_faiss

# FAISS takes a factory string apart by regular expressions that recurse for each character.
_MOST_CHARACTERS = 100
# The largest numbers in a factory string, by the letters before them; what they ask for is allocated before the first vector.
_NUMBER = re.compile(r"([A-Za-z]*)(\d+)")
_CELLS = re.compile(r"IMI(\d+)x(\d+)", re.IGNORECASE)
_MOST_NEIGHBORS = 512
# With fewer, FAISS crashes or never ends.
_LEAST_NEIGHBORS = 4
_MOST_BITS = 12
_MOST_OTHERS = 1 << 17
_MOST_TABLE_BYTES = 64 << 20
# A rotation takes the cube of its side, and is drawn at once.
_MATRIX = re.compile(r"PCA|OPQ|RR|ITQ|LSH|,SH", re.IGNORECASE)
_MOST_SIDE = 2048
_MOST_D = 1 << 16
_MOST_CELLS_BITS = 20
# A vector may be so long whatever the file's size: what FAISS allocates by itself is counted, too.
_LEAST_LIMIT = 16 << 20
_SLOW = re.compile(r"OPQ|ITQ|RCQ|RQ|LSQ|NSG|NNDescent", re.IGNORECASE)
# How inverted lists are written, full or sparse; an empty index has one of the two, and a filled one may have the other.
_LISTS = {b"full", b"sprs"}
_READ_BYTES = 1 << 20

_limits = PerProcess(threading.Lock)


@lru_cache(maxsize=16)
def empty_index(d: int, factory: str) -> tuple[Any, frozenset[bytes]]:
    """Make the empty index of a factory string, which is only to be looked at, and find the codes that it is written with.

    Raises:
        InputError: for a factory string that `check_factory_string` refuses.
        RuntimeError: for one that FAISS does not know.
    """
    faiss = import_faiss()
    check_factory_string(factory, d)
    index = faiss.index_factory(d, factory, faiss.METRIC_L2)
    codes: set[bytes] = set(_LISTS)

    def note(data: bytes) -> None:
        if len(data) == 4:
            codes.add(data)

    faiss.write_index(index, faiss.PyCallbackIOWriter(note))
    return index, frozenset(codes)


def check_factory_string(factory: str, d: int) -> None:
    """Raise InputError for a factory string that takes much memory before a vector is there, or that FAISS cannot take apart.

    Whether it knows the string, FAISS itself finds out.
    """
    if len(factory) > _MOST_CHARACTERS or not factory.isascii():
        raise InputError(f"the factory string {shorten(factory)} is longer than {_MOST_CHARACTERS} characters, or not ASCII")
    if d > (most := _MOST_SIDE if _MATRIX.search(factory) else _MOST_D):
        raise InputError(f"the factory string {factory!r} is for vectors of up to d={most}, these have d={d}; search them flat")
    for letters, digits in _NUMBER.findall(factory):
        number = int(digits)
        least, most = 1, _MOST_OTHERS
        if letters.upper().endswith(("HNSW", "NSG")):
            least, most = _LEAST_NEIGHBORS, _MOST_NEIGHBORS
        elif letters == "x":  # PQ8x10: codebooks of 2 ** 10 vectors of length d in all
            most = min(_MOST_BITS, (_MOST_TABLE_BYTES // (4 * d)).bit_length() - 1)
        elif letters.upper().startswith(("PCA", "OPQ", "RR", "PAD", "ITQ", "LSH")) or letters == "_":
            most = _MOST_SIDE
        if not least <= number <= most:
            raise InputError(f"the factory string {factory!r} has {letters}{digits}, expected {least} to {most}")
    for parts, bits in _CELLS.findall(factory):  # IMI2x8: 2 ** 8 times 2 ** 8 lists
        if int(parts) * int(bits) > _MOST_CELLS_BITS:
            raise InputError(f"the factory string {factory!r} has more than 2 ** {_MOST_CELLS_BITS} lists; lower it")


def check_stored_factory(factory: str, d: int, remedy: str) -> None:
    """Raise InputError for a factory string that takes long to build an index of, however few vectors there are.

    To be called where the string comes from a bank, and nobody has asked for it; the message ends with a remedy.
    """
    if _SLOW.search(factory) or _is_polysemous(_made_of(factory, d)[0]):
        raise InputError(f"the factory string {factory!r} takes long to build, and it is the bank that asks for it; {remedy}")


def read_index(path: Path, d: int, factory: str) -> Any:
    """Read a FAISS index that was built with a factory string, and check that it is what the string stands for.

    Raises:
        BankError: for a file that is damaged, or holds another kind of index.
        InputError: for a factory string that FAISS does not know.
    """
    faiss = import_faiss()
    expected, codes = _made_of(factory, d)
    with open(open_regular(path), "rb", buffering=_READ_BYTES) as file:  # noqa: PTH123  # of a descriptor
        source = _Source(file, codes)
        try:
            with _limited_to(max(os.fstat(file.fileno()).st_size, _LEAST_LIMIT) + _table_bytes(expected)):
                index = faiss.read_index(faiss.PyCallbackIOReader(source))
        except (RuntimeError, MemoryError, SystemError, BankError) as error:
            raise BankError(f"{path} {source.refused or f'is damaged ({_first_line(error)})'}") from error
        if file.read(1):
            raise BankError(f"{path} is damaged: something follows the index")
    if different := difference(index, expected):
        raise BankError(f"{path} is no {factory!r} index of d={d}: {different}")
    return index


def _made_of(factory: str, d: int) -> tuple[Any, frozenset[bytes]]:
    """Return what `empty_index` returns; raise InputError for a factory string that FAISS does not know, too."""
    try:
        return empty_index(d, factory)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"FAISS could not make {shorten(factory)} for d={d}: {_first_line(error)}") from error


class _Source:
    """Gives FAISS what it asks for, and stops at a four-letter code that the expected index does not have."""

    def __init__(self, file: Any, codes: frozenset[bytes]) -> None:
        self._file = file
        self._codes = codes
        self.refused = ""

    def __call__(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        # No number of ours looks like four letters or digits: it would be above 800,000,000, or a float that nobody stores.
        if len(data) == 4 and data.isalnum() and data not in self._codes:
            self.refused = f"holds {data.decode('ascii', 'replace')!r}, which the recipe's index does not have"
            raise BankError(self.refused)
        return data


@contextmanager
def _limited_to(size: int) -> Iterator[None]:
    """Let FAISS make no vector that is longer than so many bytes; its limits are those of the process."""
    faiss = import_faiss()
    with _limits():
        before = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(size)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before[0])
            faiss.set_deserialization_loop_limit(before[1])


def difference(index: Any, expected: Any) -> str:
    """Say in what an index differs from the empty one that its factory string makes; empty if only in what it holds."""
    faiss = import_faiss()
    index, expected = faiss.downcast_index(index), faiss.downcast_index(expected)
    if (found := _type_name(index)) != (wanted := _type_name(expected)):
        return f"it is of type {found}, expected {wanted}"
    for name in ("d", "metric_type", *_SETTINGS):
        value, default = getattr(index, name, None), getattr(expected, name, None)
        if value != default:
            return f"{name} of its {type(index).__name__} is {value}, expected {default}"
    if isinstance(index, faiss.IndexHNSW) and (wrong := _wrong_graph(index.hnsw, expected.hnsw)):
        return wrong
    if isinstance(index, faiss.IndexIVF) and (wrong := _wrong_lists(index, expected)):
        return wrong
    if isinstance(index, faiss.IndexPreTransform) and (wrong := _wrong_chain(index, expected)):
        return wrong
    for name in _PARTS:
        if (wanted_part := getattr(expected, name, None)) is None:
            continue
        if (part := getattr(index, name, None)) is None:
            return f"its {name} is missing"
        if wrong := difference(part, wanted_part):
            return wrong
        if name != "quantizer" and part.ntotal != index.ntotal:
            return f"its {name} holds {part.ntotal} entries, it says {index.ntotal}"
    return ""


# Types that are written as another one.
_READ_AS = {"IndexFlat": "IndexFlatL2", "OPQMatrix": "LinearTransform"}
# What an index is made of, and its settings that a factory string decides, where it has them.
_PARTS = ("storage", "quantizer", "index", "base_index", "refine_index")
_SETTINGS = ("code_size", "nlist", "nprobe", "max_codes", "parallel_mode", "k_factor", "nbits", "rotate_data", "by_residual")


def _wrong_graph(graph: Any, expected: Any) -> str:
    """Say what is wrong with an HNSW graph. FAISS has checked that its offsets and neighbors are in range."""
    faiss = import_faiss()
    for name in ("efConstruction", "efSearch"):
        if (found := getattr(graph, name)) != (wanted := getattr(expected, name)):
            return f"{name} of its graph is {found}, expected {wanted}"
    for name in ("cum_nneighbor_per_level", "assign_probas"):
        found, wanted = (faiss.vector_to_array(getattr(of, name)) for of in (graph, expected))
        if not np.array_equal(found, wanted):
            return f"{name} of its graph is not that of its factory string"
    levels = faiss.vector_to_array(graph.levels)
    if len(levels) and not (graph.entry_point >= 0 and levels[graph.entry_point] - 1 == graph.max_level == levels.max() - 1):
        return (
            f"its graph is entered at {graph.entry_point} of level {graph.max_level}, its highest level is {levels.max() - 1}"
        )
    return ""


def _wrong_lists(index: Any, expected: Any) -> str:
    """Say what is wrong with inverted lists: they must be in memory, as those of a new index are, and hold each entry once."""
    faiss = import_faiss()
    if index.invlists is None:
        return "its lists are missing"
    lists, wanted = faiss.downcast_InvertedLists(index.invlists), faiss.downcast_InvertedLists(expected.invlists)
    if type(lists) is not type(wanted) or type(lists) is faiss.OnDiskInvertedLists:
        return f"its lists are {type(lists).__name__}, expected {type(wanted).__name__}"
    if (lists.nlist, lists.code_size) != (wanted.nlist, wanted.code_size):
        return f"it has {lists.nlist} lists of {lists.code_size} bytes, expected {wanted.nlist} of {wanted.code_size}"
    if index.quantizer is None or index.quantizer.ntotal not in (0, index.nlist):
        return f"its quantizer does not hold {index.nlist} centroids"
    sizes = [lists.list_size(number) for number in range(lists.nlist)]
    if sum(sizes) != index.ntotal:
        return f"its lists hold {sum(sizes)} entries, it says {index.ntotal}"
    ids = [faiss.rev_swig_ptr(lists.get_ids(number), size).copy() for number, size in enumerate(sizes) if size]
    if ids and not np.array_equal(np.sort(np.concatenate(ids)), np.arange(index.ntotal)):
        return "its lists do not hold each entry once"
    return ""


def _wrong_chain(index: Any, expected: Any) -> str:
    """Say in what the transforms before an index differ from those of its factory string."""
    faiss = import_faiss()

    def chain(of: Any) -> list[tuple[str, int, int]]:
        steps = [faiss.downcast_VectorTransform(of.chain.at(number)) for number in range(of.chain.size())]
        return [(_type_name(step), step.d_in, step.d_out) for step in steps]

    if (found := chain(index)) != (wanted := chain(expected)):
        return f"its transforms are {found}, expected {wanted}"
    return ""


def _type_name(item: Any) -> str:
    """Return the name of a type of FAISS as it is after it was written and read."""
    name = type(item).__name__
    return _READ_AS.get(name, name)


def _is_polysemous(index: Any) -> bool:
    """Tell whether the codes of an index are permuted when it is trained, which takes seconds for each part of a vector."""
    index = import_faiss().downcast_index(index)
    parts = [part for name in _PARTS if (part := getattr(index, name, None)) is not None]
    return bool(getattr(index, "do_polysemous_training", False)) or any(map(_is_polysemous, parts))


def _table_bytes(expected: Any) -> int:
    """Return the bytes of the tables that FAISS computes for an index when it reads it."""
    index = import_faiss().downcast_index(expected)
    parts = [part for name in _PARTS if (part := getattr(index, name, None)) is not None]
    own = 4 * index.nlist * index.pq.M * index.pq.ksub if hasattr(index, "nlist") and hasattr(index, "pq") else 0
    return own + sum(map(_table_bytes, parts))


def _first_line(error: BaseException) -> str:
    return shorten(str(error).splitlines()[0] if str(error) else type(error).__name__)
