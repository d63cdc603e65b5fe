"""`distclip bench`: distclip against torch's own functions, interleaved in one run."""
