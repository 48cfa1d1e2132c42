"""The engines of exact search: the compiled kernel, FAISS, and torch on the CPU or a card."""
