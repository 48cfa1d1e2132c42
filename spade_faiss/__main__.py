"""`python -m spade_faiss`: the command line."""

import sys

from spade_faiss.cli import main

sys.exit(main())
