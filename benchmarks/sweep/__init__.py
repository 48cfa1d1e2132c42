"""Exact against approximate: points, each measured once and kept raw; tables and plots are computed from what is kept.

`points` says what is measured, `sets` and `embeddings` on what, `image_level`, `pixel_level` and `peers` how; `run` does it,
`store` keeps it, `rows` computes the metrics of `measures` from it, `tables`, `charts` and `page` show them.
"""
