"""The compiled kernel: the C++ sources in `src/`, the extension module, and what vectors are packed by."""
