"""Every generated part of README, the documentation and the package, computed from committed results and from the code."""
