"""Indexes that are built beside a bank: of its embeddings and of its maps, kept up to date as the bank changes."""
