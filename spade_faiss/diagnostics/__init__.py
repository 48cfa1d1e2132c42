"""What this machine has, whether results are right on it, and which recipe to take."""
