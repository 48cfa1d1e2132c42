"""The command line with as many pieces as there can be: what is lost in the middle of a small job has to hit some of it.

python -m benchmarks.small_pieces extract good/ --bank parts.bank --cluster auto
"""

from __future__ import annotations

from spade_faiss.cli import main
from spade_faiss.cluster import plan

if __name__ == "__main__":
    plan._LEAST_BYTES = 0
    raise SystemExit(main())
