"""From features to scores: the detector, the fusion of levels, and metrics."""
