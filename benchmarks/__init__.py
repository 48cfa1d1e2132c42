"""Measurements of spade_faiss, and its demonstration; never imported by the package."""
