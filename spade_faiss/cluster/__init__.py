"""Work on several machines: pieces of a job run on the workers of a Ray cluster, and shards of a bank have owners."""
