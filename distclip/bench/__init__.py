"""`distclip bench`: distclip against torch's own functions, interleaved in one run.

Uses public names of distclip alone, as its users do, and times them; no other package but the command line knows it.
"""
