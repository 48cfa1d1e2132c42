"""Spoiling: defects that nobody has seen yet are drawn into copies of normal pictures, with masks of what was changed."""
