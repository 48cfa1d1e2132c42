"""Compares exact with approximate search: points are measured once and stored raw; tables and plots are computed from them.

`points` says what is measured, `sets` and `embeddings` on what data, and `image_level`, `pixel_level` and `peers` how. `run`
measures, `store` writes the results, `rows` computes the metrics of `measures` from them, and `tables`, `charts` and `page`
show them.
"""
