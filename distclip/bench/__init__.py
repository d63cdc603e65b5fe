"""`distclip bench`: distclip beside torch's own functions, in turns, in one run."""
