"""One call of a Clipper, from measured gradients to what the optimizers are told.

Nothing here communicates by itself; what ranks must agree on comes from the plan's measurement.
"""
