"""Searching the nearest normals' feature maps: one module a way of searching, behind one protocol."""
