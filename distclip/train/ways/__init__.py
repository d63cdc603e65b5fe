"""The ways to spread a model over ranks, one a file."""
