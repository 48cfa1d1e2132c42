"""What computes an exact search: FAISS, the compiled kernel, or torch."""
