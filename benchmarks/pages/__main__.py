"""`python -m benchmarks.pages` writes all generated parts anew; a test fails where one of them is out of date."""

from __future__ import annotations

from benchmarks.pages.fill import filled, pages
from benchmarks.pages.measured import MEASURED, measured


def main() -> None:
    """Fill README and the pages of the documentation, and write what `spade-faiss recommend` knows into the package."""
    MEASURED.write_text(measured(), encoding="utf-8")
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
