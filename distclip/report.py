"""What one step did, as data: the library never prints or logs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import and_more


@dataclass(frozen=True, slots=True)
class Culprit:
    """Where a non-finite norm came from.

    ``kind`` is ``"NaN"`` or ``"inf"`` for the gradient of ``parameter`` on global rank ``rank``, or ``"overflow"`` if
    every gradient is finite and only the sum of powers left the range of float64 (then ``parameter`` is the one whose
    own sum did, or ``None``).

    ``ranks``: all global ranks on which the gradient of ``parameter`` is not finite. ``reduced``: DDP or FSDP had
    summed it over ranks before, so any of these may be its source: :func:`find_source` says which.

    Where norms of parameters or rows are reduced anyway (``watch="parameters"``, or a policy that needs them), these
    name the parameter, and no rank is asked: with several ranks ``rank`` is None then, ``ranks`` empty, and
    ``reduced`` true whoever has the gradient.
    """

    kind: str
    parameter: str | None
    rank: int | None
    ranks: tuple[int, ...] = ()
    reduced: bool = False

    def __str__(self) -> str:
        if self.kind == "overflow":
            which = "" if self.parameter is None else f", first in {self.parameter} on rank {self.rank}"
            return f"every gradient is finite but the sum of powers overflows float64{which}"
        if not self.reduced:
            return f"{self.parameter} on rank {self.rank} has {self.kind} in its gradient"
        holders = f"rank{'s' if len(self.ranks) > 1 else ''} {and_more(self.ranks)}"
        whose = f"reduced gradient, held by {holders}" if self.ranks else "gradient"
        return (
            f"{self.parameter} has {self.kind} in its {whose}; distclip.find_source(model) says which rank it came from"
        )


class Watched(Mapping[str, Tensor]):
    """Numbers by name: each a 0-d view of ``tensor``, (names,), made when it is asked for."""

    __slots__ = ("_names", "_places", "tensor")

    def __init__(self, names: Sequence[str], tensor: Tensor) -> None:
        self.tensor = tensor
        self._names = names
        self._places: dict[str, int] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._places is None:
            self._places = {each: k for k, each in enumerate(self._names)}
        return self.tensor[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<numbers of {len(self)} names>"


def tensors_of(watched: Mapping[str, Tensor]) -> list[Tensor]:
    """All its numbers in as few tensors as they come in."""
    return [watched.tensor] if isinstance(watched, Watched) else list(watched.values())


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What :meth:`Clipper.fingerprint` found: numbers of 64 bits, the same whatever the layout and on every rank.

    * ``total``: one number for all gradients, the sum of the others modulo 2**64.
    * ``parameters``: by name, from every bit of the gradient and its place in the whole parameter; 0 without one.
    * ``differ``: parameters whose replicas do not hold the same bits, so that their numbers mean nothing. A replica
      that differs always changes the number, and is named here in most cases, not in all.

    >>> Fingerprint(2**63 + 1, {"weight": 5, "bias": 2**63 - 4}).to_dict()
    {'total': '0x8000000000000001', 'parameters': {'weight': '0x0000000000000005', 'bias': '0x7ffffffffffffffc'}}
    """

    total: int
    parameters: Mapping[str, int]
    differ: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The numbers as texts, ``"0x..."``, which JSON keeps; ``"differ"`` only where there are some."""
        shown = {name: f"{number:#018x}" for name, number in self.parameters.items()}
        found: dict[str, Any] = {"total": f"{self.total:#018x}", "parameters": shown}
        return found | ({"differ": list(self.differ)} if self.differ else {})


@dataclass(frozen=True, slots=True)
class Report:
    """What :meth:`Clipper.measure`, :meth:`Clipper.clip_` or :meth:`Clipper.step` found and did.

    All tensors are 0-d, on the device where the group reduces, with the same bits on every rank.

    * ``norm``: total norm before clipping, float32 (float64 if a parameter is float64). A finite norm beyond float32 is
      ``finfo.max``, so ``inf`` always means a non-finite gradient (or power sum).
    * ``max_norm``: the bound that the policy chose, same dtype; ``inf`` if nothing bounds the norm.
    * ``coef``: the factor for every gradient, same dtype; exactly 1 if nothing is scaled, above 0 for a finite norm,
      and above 1 only from a policy that scales up (:class:`Normalize`). Below float32's normal numbers gradients are
      scaled by the exact factor, of which this has a few digits; on an accelerator, where the host does not know it, by
      the least normal number, which is then shown. So are factors above its inverse, 2**126.
    * ``skip``: bool; do not take the step (``step`` did not take it).
    * ``norms``: what ``watch=`` asks for, by name, before clipping: 0-d views of one tensor, of the dtype and with the
      limit of ``norm``. Empty without ``watch``.
    * ``zeros``: with ``watch_zeros=True``, which share of the elements of each gradient in ``norms`` is 0, from 0 to 1,
      by the same names; NaN where there is no gradient.
    * ``extra``: what the policy reports of itself, by name, 0-d: see :class:`Shadow`.
    * ``fingerprint``: of the gradients before clipping, every ``fingerprint_every`` steps; else None.

    ``culprit`` says where a non-finite norm came from. With the decision on an accelerator it is ``None`` here, and
    available one call later as :attr:`Clipper.culprit`.

    >>> import torch
    >>> zero = torch.zeros(())
    >>> Report(zero + 2, zero + 1, zero + 0.5, zero > 0).to_dict()
    {'norm': 2.0, 'max_norm': 1.0, 'coef': 0.5, 'skip': False}
    """

    norm: Tensor
    max_norm: Tensor
    coef: Tensor
    skip: Tensor
    culprit: Culprit | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None

    def to_dict(self) -> dict[str, float | bool]:
        """Return the four numbers, ``"norm/<name>"`` and ``"zeros/<name>"`` of what is watched, and what is ``extra``.

        Python numbers: one copy to the host, the only host sync. They may be NaN or inf, which JSON lacks
        (``json.dumps(..., allow_nan=False)`` raises): write ``str(number)`` instead, as ``metrics.jsonl`` does.
        """
        others = [
            *tensors_of(self.norms),
            *tensors_of(self.zeros),
            *(number.to(self.norm.device) for number in self.extra.values()),
        ]
        rows = [each.double().view(-1) for each in (self.norm, self.max_norm, self.coef, self.skip, *others)]
        norm, max_norm, coef, skip, *numbers = torch.cat(rows).tolist()
        watched = [*(f"norm/{name}" for name in self.norms), *(f"zeros/{name}" for name in self.zeros)]
        by_name = dict(zip([*watched, *self.extra], numbers, strict=True))
        return {"norm": norm, "max_norm": max_norm, "coef": coef, "skip": bool(skip), **by_name}
