"""The ways to distribute a model over ranks, one per file."""
