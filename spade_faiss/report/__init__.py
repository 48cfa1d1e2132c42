"""Scores and decisions as files that people and programs read: scores.h5, scores.csv, report.json, report.html and pictures.

The package presents what it is given and decides nothing; it imports neither torch nor faiss.
"""
