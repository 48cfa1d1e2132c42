"""Tries out whether the libraries that compute fit under a limit of the process's address space (`ulimit -v`).

Where they meet the limit, they do not all say so: some end the process, some print lines of their own, and some wait without
end for a thread that could not start. So they are tried out in a fork, whose end says whether they can be used here.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable

from spade_faiss.core.memory import format_bytes
from spade_faiss.features.forward.choice import usable_engines

# What the fork must do without: what is computed with takes about as much beyond what the libraries take.
_SPARE_BYTES = 512 << 20
_WAIT_S = 60.0


def check_libraries_fit(*, torch: bool) -> None:
    """Raise MemoryError if a limit of the process leaves too little for what computes; do nothing where there is no limit.

    Args:
        torch: whether torch will be loaded, which takes more than all others.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    limit, most = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or ("torch" if torch else "faiss") in sys.modules:  # where it is loaded, it fits
        return

    def use_less() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (max(0, limit - _SPARE_BYTES), most))
        _use_libraries(torch)

    if not _succeeds(use_less):
        need = "PyTorch and FAISS need" if torch else "FAISS needs"
        raise MemoryError(f"the limit on the address space, ulimit -v, is {format_bytes(limit)}; {need} more")


def _use_libraries(with_torch: bool) -> None:
    """Load all libraries, and compute something small with each that has threads or memory of its own."""
    import numpy as np

    import spade_faiss.report.html
    import spade_faiss.scoring.detector  # noqa: F401
    from spade_faiss.search.distances import import_faiss

    x = np.ones((512, 512), np.float32)
    import_faiss().knn(x, x @ x, 5)
    for engine in usable_engines("float32"):
        importlib.import_module(engine)
    if with_torch:
        import torch

        torch.nn.functional.conv2d(torch.ones(4, 8, 64, 64), torch.ones(8, 8, 3, 3))


def _succeeds(function: Callable[[], object]) -> bool:
    """Whether a function ends well in a fork, within a minute; nothing of what it prints is seen."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(null, stream)
            function()
            code = 0
        finally:
            os._exit(code)
    end, ended = time.monotonic() + _WAIT_S, False
    try:
        while time.monotonic() < end:
            found, status = os.waitpid(pid, os.WNOHANG)
            if ended := found == pid:
                return status == 0
            time.sleep(0.01)
        return False
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
