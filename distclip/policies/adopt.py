"""What a Clipper needs of its policy: to be one, a text to compare ranks by, a state to make, save and load."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from numbers import Real
from reprlib import repr as short
from typing import Any, ParamSpec, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from .checks import is_dense
from .max_norm import MaxNorm
from .protocol import Policy, State
from .statistic import MODEL, Signal, Statistic
from .trust import name_of
from .units import Units

P = ParamSpec("P")
R = TypeVar("R")


def bound_by_place(line: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A TypeError with the ``line`` to write, if a bound is passed by keyword instead of as the policy."""

    def checked(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in ("max_norm", "clip_value"):
                if name in kwargs:
                    policy = f"ValueClip({kwargs[name]!r})" if name == "clip_value" else repr(kwargs[name])
                    raise TypeError(f"{name}= is not an argument, a policy has the bound: write {line.format(policy)}")
            return function(*args, **kwargs)

        return call

    return checked


def as_policy(policy: Policy | float) -> Policy:
    """``policy`` itself, or MaxNorm of a number."""
    if isinstance(policy, Policy) and not isinstance(policy, type):
        return policy
    if isinstance(policy, Real) and not isinstance(policy, bool):
        return MaxNorm(float(policy))
    if (
        isinstance(policy, Tensor)
        and policy.numel() == 1
        and policy.dtype is not torch.bool
        and not policy.is_complex()
    ):
        return MaxNorm(float(policy.item()))
    raise ValueError(f"policy must be a number or have needs(), init() and decide() of distclip.Policy, got {policy!r}")


def needs(policy: Policy) -> list[Statistic | Signal]:
    """The statistics and signals that it asks for; ValueError if they are none."""
    found = policy.needs()
    if not isinstance(found, (tuple, list)) or not all(isinstance(each, (Statistic, Signal)) for each in found):
        raise ValueError(
            f"{type(policy).__qualname__}.needs returned {short(found)}, and no Clipper was made: return a sequence of "
            'distclip.Statistic, such as (Statistic("parameter"),), empty for the norm of all gradients'
        )
    return list(dict.fromkeys(each for each in found if each != MODEL))


def without_signals(policy: Policy | float, caller: str) -> Policy:
    """The policy that is given; ValueError where it asks for signals, which ``caller`` has no way to pass."""
    adopted = as_policy(policy)
    names = [each.name for each in needs(adopted) if isinstance(each, Signal)]
    if names:
        raise ValueError(
            f"{name_of(adopted)} asks for the signals {', '.join(names)}, and nobody passes signals= where {caller} "
            "clips: take a policy without, or call step(optimizer, signals=...) of a Clipper in a loop of your own"
        )
    return adopted


def made(policy: Policy, units: Units, device: torch.device) -> State:
    """The state before the first step, in memory of its own; ValueError if it is no state."""
    state = policy.init(units, device)
    if not isinstance(state, dict) or not all(isinstance(n, str) and is_dense(v) for n, v in state.items()):
        raise ValueError(
            f"{type(policy).__qualname__}.init returned {short(state)}, and no Clipper was made: return a dictionary "
            "of dense tensors by their names, empty for a policy without memory"
        )
    return {name: value.detach().clone() for name, value in state.items()}


def spelled(value: Any, inside: tuple[int, ...] = ()) -> str:
    """A text that is equal on ranks whose policies are: of its numbers, texts and inner policies.

    Of anything else only the type: a device, a file or the address of an object may differ between ranks that agree.
    """
    match value:
        case None | bool() | str() | Real():
            return repr(value)
        case tuple() | list():
            return f"[{', '.join(spelled(item, inside) for item in value)}]"
        case Mapping():
            return f"{{{', '.join(f'{spelled(k, inside)}: {spelled(v, inside)}' for k, v in value.items())}}}"
        case _ if (isinstance(value, Policy) or is_dataclass(value)) and id(value) not in inside:
            names = [f.name for f in fields(value)] if is_dataclass(value) else sorted(getattr(value, "__dict__", ()))
            held = (f"{name}={spelled(getattr(value, name), (*inside, id(value)))}" for name in names)
            return f"{type(value).__qualname__}({', '.join(held)})"
    return type(value).__qualname__


def hash_of(state: State, number: int) -> int:
    """A number above 0 that is equal where ``state`` and ``number`` are. Syncs with their device."""
    code = crc32(repr(number).encode())
    for name, value in sorted(state.items()):
        bits = value.double().flatten().view(torch.int64)  # as a text, those of a state by rows would take seconds
        mixed = (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum().item()
        code = crc32(repr((name, tuple(value.shape), mixed)).encode(), code)
    return code or 1


def with_keys(given: Any, wanted: Iterable[str], whose: str) -> dict[str, Any]:
    """``given`` if it is a dictionary with exactly these keys; ValueError if not."""
    if not isinstance(given, dict):
        raise ValueError(f"{whose} state is a dictionary, got {type(given).__name__}")
    if set(given) != set(wanted):
        raise ValueError(f"{whose} state has the keys {sorted(wanted)}, got {sorted(map(str, given))}")
    return given


def fitting(given: Any, made: State) -> State:
    """``given`` on the device of ``made``; ValueError if it does not fit, or holds NaN. Syncs with its device."""
    given = with_keys(given, made, "this policy's")
    for name, own in made.items():
        value = given[name]
        if not is_dense(value):
            raise ValueError(f"policy state {name} must be a dense tensor with values, got {type(value).__name__}")
        if value.shape != own.shape or value.dtype != own.dtype:
            raise ValueError(
                f"policy state {name} must have shape {tuple(own.shape)} and dtype {own.dtype}, got "
                f"{tuple(value.shape)} and {value.dtype}: load it into a policy with the same settings"
            )
        if value.isnan().any():
            raise ValueError(f"policy state {name} holds NaN: it was damaged, load another checkpoint")
    return {name: given[name].detach().to(own.device, copy=True) for name, own in made.items()}
