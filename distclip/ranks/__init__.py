"""Everything that communicates: which ranks take part, what travels between them, who did not come.

Never reads a gradient: it is handed numbers and texts. Whatever communicates elsewhere goes through here, but for the
redistribution of DTensors, which is torch's.
"""
