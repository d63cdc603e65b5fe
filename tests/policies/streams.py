"""Norms as training has them, and what a policy answers to them step by step."""

from collections.abc import Sequence
from math import inf, isfinite, nan
from random import Random

import torch
from torch import Tensor

from distclip import Decision, Policy, Statistic, Statistics, Units
from distclip.policies.units import Gather, Level
from policies.reference import Answer

CPU = torch.device("cpu")
EVENTS = {3: nan, 5: 0.0, 9: 1e3, 40: inf, 41: nan, 90: 0.0, 95: 1e3, 96: 20.0, 99: 5.0, 130: 1e-9, 250: nan}


def norms_of(seed: int = 0, steps: int = 320, shift: int = 150, level: float = 2.0) -> list[float]:
    """About 1, and later about ``level``, with :data:`EVENTS`; roots of squares, as statistics of units are."""
    random = Random(seed)
    noise = [(1.0 if step < shift else level) * random.lognormvariate(0, 0.05) for step in range(steps)]
    found = [EVENTS.get(step - 7 * seed, norm) for step, norm in enumerate(noise)]
    return [(norm * norm) ** 0.5 if isfinite(norm) else norm for norm in found]


def statistics(norm: float, signals: dict[str, float] | None = None) -> Statistics:
    given = {name: torch.tensor(number, dtype=torch.float64) for name, number in (signals or {}).items()}
    return Statistics(torch.tensor(norm, dtype=torch.float64), Units(), signals=given)


def run(
    policy: Policy, norms: Sequence[float], state: dict[str, Tensor] | None = None
) -> tuple[list[Answer], dict[str, Tensor]]:
    """What it answers, step by step, and its last state."""
    state, answers = policy.init(Units(), CPU) if state is None else state, []
    kinds = {name: (value.shape, value.dtype) for name, value in state.items()}
    for norm in norms:
        seen = statistics(norm)
        decision, state = policy.decide(seen, state)
        answers.append(read(decision, seen))
        assert {name: (value.shape, value.dtype) for name, value in state.items()} == kinds
    return answers, state


def read(decision: Decision, seen: Statistics) -> Answer:
    return float(decision.max_norm), coef_of(decision, seen).item(), bool(decision.skip)


def coef_of(decision: Decision, seen: Statistics) -> Tensor:
    """The coefficient, or torch's formula with the bound."""
    norm = seen.norm(decision.per)
    if decision.coef is not None:
        return torch.as_tensor(decision.coef, dtype=torch.float64).expand_as(norm)
    return (torch.as_tensor(decision.max_norm, dtype=torch.float64) / (norm + 1e-6)).clamp(max=1.0)


def units_of(count: int, device: str = "cpu") -> Units:
    names = [f"p{k}" for k in range(count)]
    level = Level(names, torch.ones(count), Gather(), torch.arange(count).to(device))
    return Units(float(count), {Statistic("parameter"): level})


def of_units(norms: Sequence[float], device: str = "cpu") -> Statistics:
    slots = torch.tensor([norm * norm for norm in norms], dtype=torch.float64)
    return Statistics(slots.sum().sqrt().to(device), units_of(len(norms), device), {"gradient": slots.to(device)})


def per_unit(number: Tensor | float, count: int = 3) -> list[float]:
    return torch.as_tensor(number, dtype=torch.float64).expand(count).tolist()
