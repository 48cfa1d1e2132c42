"""Tuning: which settings tell spoilt copies of normal pictures from the pictures best, by paired statistics."""
