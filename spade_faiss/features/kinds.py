"""Tells normal images from defective ones by the folders that they lie in, where the two could be mistaken for each other."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from spade_faiss.core.errors import InputError
from spade_faiss.features.folders import name_some

# In lower case, without what is no letter.
_NORMAL = re.compile(
    "goods?|ok|okay|normals?|fine|pass(ed)?|io|healthy|intact|nominal|undamaged|faultless|"
    "(defect|anomaly|fault|damage)free|no(defects?|anomal(y|ies))|non(defective|anomalous)"
)
_DEFECTIVE = re.compile(
    "bad|defect(s|ive)?|ng|nok|notok|ko|nio|abnormal|anomal(y|ies|ous)|fail(ed)?|faulty|damaged|broken|reject(s|ed)?"
)
# What the parts of a labeled set are called.
_PARTS = {
    "train": re.compile("train(ing)?"),
    "test": re.compile("test(ing|public|private)?"),
    "truth": re.compile("groundtruth"),
    "masks": re.compile("masks?"),
    "images": re.compile("images?"),
}


def check_kinds(found: Iterable[str], normal_kind: str) -> None:
    """Raise InputError if a kind is normal by its name, and is not the normal kind.

    Args:
        found: the kinds of the test images.
        normal_kind: what the normal kind is called.
    """
    kinds = sorted(found)
    if not (others := [kind for kind in kinds if kind != normal_kind and _NORMAL.fullmatch(_letters(kind))]):
        return
    which = " and ".join(f"test/{kind}" for kind in others)
    if normal_kind in kinds:
        remedy = f"move normal images into test/{normal_kind}, or rename the folder if they are defective"
    else:
        remedy = f"rename test/{others[0]} to test/{normal_kind}, or say what it is called: --normal-kind {others[0]}"
    raise InputError(f"the images in {which} would count as defective: the normal kind is called {normal_kind!r}; {remedy}")


def check_normals(sources: Sequence[Path], images: Iterable[Path]) -> None:
    """Raise InputError if images that are to be taken as normal are those of a labeled set: defects and masks are among them.

    Args:
        sources: the folders that were asked for; folders that were listed one by one are taken as they are meant.
        images: what was found in them.
    """
    parents = {path.parent for path in images}
    for source in sources:
        inside: defaultdict[Path, set[str]] = defaultdict(set)
        for parent in parents:
            if parent.is_relative_to(source):
                inside[source] |= set()
                while parent != source:
                    inside[parent.parent].add(parent.name)
                    parent = parent.parent
        for folder in sorted(inside):
            _check_folder(folder, inside[folder])


def _check_folder(folder: Path, names: set[str]) -> None:
    """Raise InputError for a folder of normal images whose folders, of these names, say that they are not all normal."""
    if _part(folder.name) == "truth":
        raise InputError(f"{folder} holds the masks of a labeled set, which are no normal images; {_suggest(folder.parent)}")
    parts = {name: part for name in sorted(names) if (part := _part(name))}
    found = {*parts.values()}
    if found >= {"train", "test"} or "truth" in found or ("masks" in found and len(found) > 1):
        raise InputError(
            f"{folder} is the root of a labeled set, it holds {_folders(parts)}: defects and masks would become normal images; "
            f"{_suggest(folder)}"
        )
    normal = sorted(name for name in names if _NORMAL.fullmatch(_letters(name)))
    others = sorted(names - set(normal))
    defective = [name for name in others if _DEFECTIVE.fullmatch(_letters(name))]
    if normal and (defective or (others and _part(folder.name) in ("train", "test"))):
        raise InputError(
            f"{folder} holds {normal[0]}/ beside {_folders(defective or others)}: defects would become normal images; "
            f"give the folder of the normal ones, {folder / normal[0]}, or list all folders that are meant"
        )


def _suggest(root: Path) -> str:
    """Which folder of a labeled set to give in place of its root."""
    train = next((path for path in sorted(root.iterdir()) if path.is_dir() and _part(path.name) == "train"), None)
    if train is None:
        return "give the folder of its normal images alone, usually train/good"
    normal = next((path for path in sorted(train.iterdir()) if path.is_dir() and _NORMAL.fullmatch(_letters(path.name))), train)
    return f"give the folder of its normal images alone: {normal}"


def _part(name: str) -> str | None:
    """Which part of a labeled set a folder is by its name."""
    return next((part for part, names in _PARTS.items() if names.fullmatch(_letters(name))), None)


def _folders(names: Iterable[str]) -> str:
    return name_some([f"{name}/" for name in names])


def _letters(name: str) -> str:
    return "".join(filter(str.isalpha, name.casefold()))
