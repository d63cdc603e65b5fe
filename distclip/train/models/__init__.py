"""One small model a file, each with the config section it is built from."""
