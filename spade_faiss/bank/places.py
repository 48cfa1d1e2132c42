"""The files and folders that a bank consists of."""

from __future__ import annotations

from pathlib import Path

from spade_faiss.bank.codes import CODES
from spade_faiss.bank.locks import LOCK, READERS, WRITER
from spade_faiss.bank.network import NETWORK
from spade_faiss.core.files import TEMPORARY_PATTERN
from spade_faiss.core.inside import check_inside, check_tree, files_in

MANIFEST = "manifest.json"
SHARDS = "features"
INDEXES = "indexes"
CALIBRATIONS = "calibration"
TUNING = "tuning.json"
# What is built of one product alone: products/FOLDER/indexes and products/FOLDER/calibration, as those of a whole bank.
PRODUCTS = "products"

NAMES = (MANIFEST, SHARDS, CODES, NETWORK, INDEXES, CALIBRATIONS, TUNING, LOCK, WRITER, READERS)
# A shard that a worker of a cluster has written, and that is not committed yet.
STAGED = "staged-*.h5"
# indexes/NAME/gallery/FILE, and the same below products/FOLDER
_DEPTH, _PRODUCT_DEPTH = 4, 6


def check_places(folder: Path) -> None:
    """Check that all that a bank consists of is files and folders of its own; what else lies in its folder is not touched.

    Raises:
        BankError: for a link, a pipe, a socket or a device; the message names it.
        AccessError: if the operating system does not let us look.
    """
    check_tree(folder, NAMES, _DEPTH)
    check_tree(folder, (PRODUCTS,), _PRODUCT_DEPTH)


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files of killed writers in a folder, and in those of the shards and of the network, and shards that
    nobody committed. Those below indexes/ are not among them: an index may be built at the same time.
    """
    temporary = [
        path
        for place in (folder, *(check_inside(folder, name) for name in (SHARDS, NETWORK)))
        for path in files_in(place, TEMPORARY_PATTERN)
    ]
    return [*temporary, *files_in(check_inside(folder, SHARDS), STAGED)]
