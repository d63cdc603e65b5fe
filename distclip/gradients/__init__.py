"""What this rank has of the gradients, and where in memory it lies.

Looks at gradients and may replace one in `.grad`; sums and scales nothing, and decides nothing that another rank must
know. Only `realign` communicates, by torch's own redistribution.
"""
