"""The bank: the features of normal images, stored as immutable shards that one manifest names."""
