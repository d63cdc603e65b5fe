"""How others step: fused optimizers, GradScaler, hooks, and optimizers around optimizers.

May set attributes and hooks of an optimizer, and takes them back. Knows no plan and no policy.
"""
