"""The compiled kernel: C++ sources in `src/`, the extension module, and how it encodes the vectors of a level."""
