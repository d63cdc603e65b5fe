"""From parameters to one number for all ranks: made once from a model, then measures, compares and blames.

Joins who holds what with what this rank has. Never decides what a step does with the number it measured.
"""
