"""What is built beside a bank: the index over embeddings, what searches keep of the maps, and whether it still fits."""
