"""One file for each framework, imported by its users alone: ``from distclip.integrations.lightning import ...``.

Each imports its framework and distclip's seam (see [Note: the seam] in step/__init__.py), and may hook into the
framework it is about.
"""
