"""How the maps of a bank are stored: as numbers of 16 or 32 bits, or as codes of a byte or a few bits a number."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import shorten

# The number formats of stored maps.
DTYPES = ("float16", "float32", "int8")
# What a bank may store of a vector whose channels are many: at least one component beside the length of the rest.
LEAST_NUMBERS, MOST_NUMBERS = 2, 1024
# Most channels of a level that packed codes turn whole. The basis takes the square of them, and so does learning it; checking
# it, whenever a bank is opened, takes their cube: 2,048 take 16 MiB, 1.4 GiB and a minute and a half of the processor to learn,
# and half a second to open. Few networks have more.
MOST_TURNED = 2048
# How many bits a number of packed codes takes on average.
LEAST_BITS, MOST_BITS = 2, 6
STORES = (
    "float16, float32, int8, int2 to int6, or one of the codes after pcaN- with N from 2 to 1024, one for all levels or one "
    "for each, such as pca64-int8"
)

_CODES = re.compile(r"(?:pca([0-9]{1,4}(?:,[0-9]{1,4})*)-)?int([2-6]|8)")
_BYTE = "8"


@dataclass(frozen=True, kw_only=True)
class Store:
    """How the maps of a bank are stored.

    Args:
        dtype: the type of a stored number.
        numbers: of codes, the most numbers that are stored of a vector: the components along which the bank's vectors vary
            most, and, as the last one, the length of what these leave over. One for all levels, or one for each, the finest
            first. None stores every channel.
        bits: of codes that are packed, how many bits a number takes on average: those along which vectors vary most take more.
            None for a byte each.
    """

    dtype: str = "float16"
    numbers: tuple[int, ...] | None = None
    bits: int | None = None

    @classmethod
    def parse(cls, text: str) -> Store:
        """Read a store from its name.

        Raises:
            InputError: if there is none of that name.
        """
        found = _CODES.fullmatch(text) if isinstance(text, str) else None
        if found is not None:
            numbers = None if found[1] is None else tuple(map(int, found[1].split(",")))
            if numbers is None or (min(numbers) >= LEAST_NUMBERS and max(numbers) <= MOST_NUMBERS):
                return cls(dtype="int8", numbers=numbers, bits=None if found[2] == _BYTE else int(found[2]))
        elif text in DTYPES:
            return cls(dtype=text)
        raise InputError(f"store={shorten(text)} is not one of {STORES}")

    @property
    def is_coded(self) -> bool:
        """Whether maps are stored as codes."""
        return self.dtype == "int8"

    def __str__(self) -> str:
        name = self.dtype if self.bits is None else f"int{self.bits}"
        if self.numbers is None:
            return name
        numbers = self.numbers[:1] if len(set(self.numbers)) == 1 else self.numbers
        return f"pca{','.join(map(str, numbers))}-{name}"
