"""Examines the machine and advises: whether results are right on it, how fast it is, and which recipe to take."""
