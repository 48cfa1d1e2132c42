"""The errors that spade_faiss raises on purpose."""

from spade_faiss.core.copies import named


class SpadeError(Exception):
    """The base of all errors below. Its message says what went wrong and what to do next.

    Where a file lies in the copy of what is at a URL, the message names the URL.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(named(each) if isinstance(each, str) else each for each in args))


class InputError(SpadeError, ValueError):
    """An argument, an image, an array or a setting that cannot be used."""


class NotFoundError(SpadeError, FileNotFoundError):
    """A file or folder that should exist does not."""


class BankError(SpadeError, ValueError):
    """A bank, shard or index on disk that is damaged, or that does not fit what is asked of it."""


class BusyError(BankError):
    """A bank or an index that another process is writing to; it is worth another try once that has finished."""


class AccessError(SpadeError, OSError):
    """A file that the operating system does not open: no permission, or too many open files. It need not be damaged."""


class StorageError(SpadeError, OSError):
    """Storage at a URL that cannot be reached, or that does not let us read or write."""


class DependencyError(SpadeError, ImportError):
    """An optional package that is needed now is not installed."""


class ClusterError(SpadeError, RuntimeError):
    """A cluster that cannot be reached, or whose workers are lost; the message names the node or the piece of the work."""
