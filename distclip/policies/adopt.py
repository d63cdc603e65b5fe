"""What a Clipper asks of the policy that it is given: to be one, to be spelled, to take back a state."""

from dataclasses import fields, is_dataclass
from typing import Any

from .max_norm import MaxNorm
from .policy import Policy, State


def as_policy(policy: Policy | float) -> Policy:
    """``policy`` itself, or MaxNorm of a number."""
    if isinstance(policy, Policy) and not isinstance(policy, type):
        return policy
    if isinstance(policy, (int, float)) and not isinstance(policy, bool):
        return MaxNorm(policy)
    raise ValueError(f"policy must be a number or have the methods of distclip.Policy, got {policy!r}")


def spelled(policy: Policy) -> str:
    """A text that is equal on ranks whose policies are."""
    name = type(policy).__qualname__
    if is_dataclass(policy):
        return f"{name}({', '.join(f'{f.name}={getattr(policy, f.name)!r}' for f in fields(policy))})"
    return name


def fitting(given: dict[str, Any], made: State) -> State:
    """``given`` on the device of ``made``; ValueError where keys, shapes or dtypes differ."""
    if set(given) != set(made):
        raise ValueError(f"this policy's state has the keys {sorted(made)}, got {sorted(given)}: another policy?")
    for name, own in made.items():
        value = given[name]
        if value.shape != own.shape or value.dtype != own.dtype:
            raise ValueError(
                f"policy state {name} must have shape {tuple(own.shape)} and dtype {own.dtype}, got "
                f"{tuple(value.shape)} and {value.dtype}: load it into a policy with the same settings"
            )
    return {name: given[name].to(own.device, copy=True) for name, own in made.items()}
