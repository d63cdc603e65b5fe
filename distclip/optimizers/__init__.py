"""How optimizers step: fused ones, with a GradScaler, through hooks, and around other optimizers.

May set attributes and hooks of an optimizer, and removes them again. Knows no plan and no policy.
"""
