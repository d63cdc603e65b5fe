"""`distclip doctor` and `inspect`: whether the norm is right on these ranks, and what a Clipper does with a model.

Ranks tell each other what they find through the job's store (meeting.py), so that a backend that fails, or a rank that
dies, is named by the others. May touch public names, the bench's models, and what the plan of a Clipper knows.
"""
