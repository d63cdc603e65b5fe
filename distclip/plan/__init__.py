"""From parameters to the norms that all ranks see: made once from a model, then measures, compares and blames.

Joins who holds what with what this rank has. Never decides what a step does with the number it measured. `refusals` has
all errors of the package.

[Note: pieces]
A *holder* is the tensor in whose ``.grad`` a gradient lies: a parameter, or FSDP1's flat one. A *piece* is what this
rank has of one parameter, and most holders hold one; a flat one holds many. A *plan* is made once from all pieces and
keeps no tensor alive; its *sources* say in the gradient of which holder each piece lies. *Replicas* are the ranks that
hold the same elements of a piece, counted by ``replicas``: each contributes 1 / replicas of its sum of powers, and one
of them, the *representative*, stands for all where replicas are compared. A *run* is one or several gradients that lie
side by side in memory, summed and scaled as one tensor; where finer norms than the model's are asked for, each piece is
summed by itself ([Note: units and slots] in policies/statistics.py). A gradient is *misplaced* where its placements are
not those of its parameter, and *realigned* when it was redistributed. Two *flags* may travel with the norm: some rank
has misplaced gradients, some rank has float64. In one call all ranks have the same *tag*, which enters the *agreement
word*.
"""
