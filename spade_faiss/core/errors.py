"""The errors that spade_faiss raises on purpose."""


class SpadeError(Exception):
    """Anything that went wrong for a reason we can name; the message says what to do next."""


class InputError(SpadeError, ValueError):
    """An argument, an image, an array or a setting that cannot be used."""


class NotFoundError(SpadeError, FileNotFoundError):
    """A file or folder that should be there is not."""


class BankError(SpadeError, ValueError):
    """A bank, shard or index on disk that is damaged, or does not fit what is asked of it."""


class DependencyError(SpadeError, ImportError):
    """An optional package that is needed now is not installed."""
