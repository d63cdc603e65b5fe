"""Optimizers around optimizers: which of them to clip for, and which cannot be clipped for before they step.

Recognised by class names and attributes, as read in accelerate 1.15, lightning 2.6, torchft 2026.10, opacus 1.6,
schedulefree 1.4, timm 1.0 and pytorch_optimizer 4.1; none of them is imported.
"""

from typing import Any
from weakref import ProxyTypes

from . import refusals

PROXIES = {
    "AcceleratedOptimizer",
    "LightningOptimizer",
    "_FabricOptimizer",
}  # whose step() may do many things
WHOLE = {  # take gradients as they are, and count or move parameters around the inner step
    "LARC",
    "Lookahead",
    "OrthoGrad",
    "ScheduleFreeWrapper",
    "ScheduleFreeWrapperReference",
    "TRAC",
}


def is_optimizer(found: Any) -> bool:
    """Whether this has what optimizers have, of torch or not: ``step`` and ``param_groups``."""
    return callable(getattr(found, "step", None)) and isinstance(getattr(found, "param_groups", None), (list, tuple))


def with_inner(optimizer: Any) -> list[Any]:
    """``optimizer``, those it wraps that hold the same parameters, and those that they wrap."""
    found = [optimizer]
    for one in found:
        found += [value for value in _inside(one).values() if all(value is not known for known in found)]
    return found


def clip_target(optimizer: Any) -> Any:
    """The optimizer whose gradients are final when its step begins, so that they are clipped then.

    That is the innermost: those around it may accumulate, ask a manager, or make other gradients first. Only a
    Lookahead or a schedule-free wrapper is clipped for as a whole: if just the inner step were skipped, the one would
    count it and the other would move its average. ValueError where the innermost is ambiguous, or where gradients
    bypass it.
    """
    if deepspeed_steps(optimizer):
        raise refusals.deepspeed_steps_it(_name(optimizer))
    if "WSAM" in _names(optimizer):
        raise refusals.adds_gradients_itself()
    seen: list[Any] = []
    applies = optimizer
    while all(applies is not one for one in seen):
        names = _names(applies)
        if "AcceleratedOptimizer" in names and applies.scaler is not None:
            raise refusals.replaces_inner_step(_name(applies))
        if names & WHOLE and not names & PROXIES:
            break
        seen.append(applies)
        applies = _inner(applies)
    return applies


def refuse_clip_before_step(optimizer: Any) -> None:
    """ValueError for one whose gradients are not there yet before its ``step()``, so that a clip would miss them."""
    name = _name(optimizer)
    if deepspeed_steps(optimizer):
        raise refusals.deepspeed_steps_it(name)
    if callable(getattr(getattr(optimizer, "manager", None), "should_commit", None)):
        raise refusals.asks_to_commit(name)
    if hasattr(optimizer, "original_optimizer") and hasattr(optimizer, "pre_step"):
        raise refusals.gradients_inside_step(name)
    if hasattr(optimizer, "second_step") or any("SAM" in kind for kind in _names(optimizer)):
        raise refusals.second_gradients(name)


def refuse_proxy(optimizer: Any) -> None:
    """ValueError for a framework's proxy whose ``step()`` would do nothing now, or unscale after the clip."""
    names = _names(optimizer)
    if "AcceleratedOptimizer" in names:
        if optimizer.scaler is not None:
            raise refusals.unscales_inside_step(_name(optimizer), refusals.ACCELERATE)
        if not optimizer.gradient_state.sync_gradients:
            raise refusals.accumulates(_name(optimizer))
    for proxy, clipper in (("LightningOptimizer", "ClipGradients"), ("_FabricOptimizer", "FabricClipper")):
        if proxy in names:
            strategy = optimizer._strategy
            if "DeepSpeedStrategy" in _names(strategy):
                raise refusals.deepspeed_steps_it(_name(optimizer))
            precision = getattr(strategy, "precision_plugin", None) or getattr(strategy, "precision", None)
            if getattr(precision, "scaler", None) is not None:
                raise refusals.unscales_inside_step(_name(optimizer), f"{clipper} of distclip.integrations.lightning")


def deepspeed_steps(optimizer: Any) -> bool:
    """Whether a DeepSpeed engine keeps its gradients and steps it: ``engine.optimizer``, or accelerate's wrapper."""
    kinds = type(optimizer).__mro__
    return any(
        kind.__module__.startswith("deepspeed.runtime.") or kind.__name__ == "DeepSpeedOptimizerWrapper"
        for kind in kinds
    )


def _inner(optimizer: Any) -> Any:
    """The one that it wraps, or itself if there is none; ValueError if there are two."""
    found = list(_inside(optimizer).items())
    if len(found) > 1:
        (first, _), (second, _), *_ = found
        raise refusals.two_inside(_name(optimizer), first, second)
    return found[0][1] if found else optimizer


def _inside(optimizer: Any) -> dict[str, Any]:
    """Its attributes that are optimizers of the same parameters, by name, each once."""
    held = _ids(optimizer)
    found = {
        id(value): (name, value)
        for name, value in getattr(optimizer, "__dict__", {}).items()
        if not isinstance(value, ProxyTypes) and value is not optimizer and is_optimizer(value) and _ids(value) == held
    }
    return dict(found.values())


def _ids(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _names(found: Any) -> set[str]:
    return {kind.__name__ for kind in type(found).__mro__}


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__
