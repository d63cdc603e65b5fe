"""One small model per file, with its config section."""
