"""Scores as files that people and programs read: scores.h5, scores.csv, report.json, report.html and pictures.

Pure presentation: data in, files out. Nothing here reads a bank, and nothing here imports torch or faiss.
"""
