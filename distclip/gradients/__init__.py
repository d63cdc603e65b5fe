"""What this rank has of the gradients, and where in memory it lies.

Looks at gradients and may replace one where it is stored; sums and scales nothing, and decides nothing that another
rank must know. Only `realign` communicates, by torch's own redistribution. `refusals` has all errors of the package.
"""
