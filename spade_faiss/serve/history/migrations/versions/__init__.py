"""The migrations, each in a file of its own."""
