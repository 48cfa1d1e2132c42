"""The bank: the stored features of normal images, as immutable shards that one manifest names."""
