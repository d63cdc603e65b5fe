"""One file for each framework, imported by its users alone: ``from distclip.integrations.lightning import ...``."""
