"""Everything that communicates: which ranks take part, what they send each other, and who did not join.

May touch torch.distributed and the job's store, and no gradient: it is handed numbers and texts, explained in
[Note: what travels] in message.py. What others communicate goes through here, but for torch's own redistribution.
"""

from .lost_ranks import name_lost_ranks as name_lost_ranks
