"""One file for each framework, each imported by its users alone: ``from distclip.integrations.lightning import ...``."""
