"""What a Clipper does with a model: where its parameters lie, what is summed as one, what travels, who folds.

From its plan and from this rank's gradients, where there are any; nothing is communicated.
"""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from torch import Tensor
from torch.distributed.tensor import Placement
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip import Clipper
from distclip.doctor.meeting import Record
from distclip.gradients.runs import find_runs, spans_of
from distclip.layouts.piece import Piece, local_tensor
from distclip.optimizers.fused import FOLDING, Folding, can_fold
from distclip.plan.build import Plan
from distclip.plan.copies import has_copies


def inspected(clipper: Clipper, optimizers: Sequence[Optimizer], has_gradients: bool) -> Record:
    """What this rank knows, as JSON has it. ``has_gradients``: after a backward."""
    plan = clipper.engine.plan
    return {
        "policy": repr(clipper.policy),
        "norm_type": plan.p if plan.p < inf else "inf",
        "parameters": list(parameters(plan)),
        "runs": runs(clipper) if has_gradients else None,
        "message": message(plan),
        "collectives": collectives(plan),
        "optimizers": [fold(clipper, optimizer) for optimizer in optimizers] or would_fold(clipper),
    }


def parameters(plan: Plan) -> Iterator[dict[str, Any]]:
    """Each parameter that this rank holds."""
    for i, piece in enumerate(plan.pieces):
        yield {
            "name": plan.label(i),
            "shape": list(piece.global_shape),
            "elements": piece.size,
            "here": piece.here,
            "dtype": str(piece.dtype).removeprefix("torch."),
            "device": piece.device.type,
            "placements": placements(piece),
            "where": plan.where[i],
            "replicas": plan.replicas[i],
        }


def placements(piece: Piece) -> str:
    """How a parameter is placed on its ranks: ``Shard(0) over dp=2``."""
    parts = []
    if piece.spec is not None:
        mesh = piece.spec.mesh
        names = mesh.mesh_dim_names or [f"axis {k}" for k in range(mesh.ndim)]
        pairs = zip(names, piece.spec.placements, strict=True)
        parts = [f"{spelled(placement)} over {name}={mesh.size(k)}" for k, (name, placement) in enumerate(pairs)]
    if piece.flat_over:
        parts.append(f"flat over {len(piece.flat_over)} ranks")
    return ", ".join(parts) or "plain"


def spelled(placement: Placement) -> str:
    """``Shard(0)``, ``Replicate``: without the details that a repr has."""
    dim = getattr(placement, "dim", None)
    return type(placement).__name__.lstrip("_") + ("" if dim is None else f"({dim})")


def runs(clipper: Clipper) -> dict[str, int]:
    """How many gradients there are, and in how many runs they are summed and scaled."""
    plan, gradients = clipper.engine.plan, clipper.engine.progress.storage.read()
    present = [gradient for gradient in gradients if gradient is not None]
    local = plan.look(gradients)
    if local.error is not None or local.misplaced or local.instead:
        return {"gradients": len(present), "runs": len(present)}
    tensors: list[Tensor] = list(map(local_tensor, present))
    spans = spans_of(local, gradients, plan.pieces, plan.sources)
    return {"gradients": len(local.indices), "runs": len(find_runs(local, spans, tensors, plan.kinds))}


def message(plan: Plan) -> dict[str, Any]:
    """What travels in the one all-reduce of a call."""
    norms = plan.length or 1
    words = norms + (2 if plan.p == inf else 1) + 2 * plan.sends_flags
    alone = plan.group.reference is None
    return {
        "numbers": 0 if alone else words,
        "bytes": 0 if alone else 8 * words,
        "norms": norms,
        "on": plan.device.type,
    }


def collectives(plan: Plan) -> dict[str, Any]:
    """How many a call makes: [Note: collectives and host syncs] at the head of distclip."""
    if plan.group.reference is None:
        return {"per call": 0}
    found: dict[str, Any] = {"per call": 1}
    steps = (plan.group.size - 1).bit_length()  # [Note: adding by key] in ranks/by_key.py
    comparing = int(has_copies(plan)) + (2 * steps + 1) * bool(plan.by_split_over)
    if comparing:
        found["more in calls 1, 2, 4, 8, ..."] = comparing
    if plan.slots is None:
        found["more where the norm is not finite"] = 3
    if plan.reads_flags:
        found["more where gradients are misplaced"] = 1
    return found


def fold(clipper: Clipper, optimizer: Optimizer) -> dict[str, str]:
    """Whether this optimizer applies the coefficient itself, and why not."""
    name = type(optimizer).__name__
    return {
        "optimizer": name,
        "folds": "yes" if folds(clipper, optimizer) else "no",
        "why": why_not(clipper, optimizer),
    }


def folds(clipper: Clipper, optimizer: Optimizer) -> bool:
    engine = clipper.engine
    found = Folding(engine.owner.clipped, may_fold=engine.progress.storage.in_grad).of([optimizer])
    return all(found.by_optimizer)


def why_not(clipper: Clipper, optimizer: Optimizer) -> str:
    """Why it does not fold, empty where it does."""
    if folds(clipper, optimizer):
        return ""
    if type(optimizer) not in FOLDING:
        return f"it is none of torch's {', '.join(kind.__name__ for kind in FOLDING)}"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return "it is not fused: pass fused=True"
    if not can_fold(optimizer):
        return "this torch's own does not heed a scale"
    if not clipper.engine.progress.storage.in_grad:
        return "gradients are not in .grad"
    return "it holds parameters that this Clipper does not clip"


def would_fold(clipper: Clipper) -> list[dict[str, str]]:
    """The same of torch's own optimizers over these parameters, fused, where nobody gave any."""
    found = []
    for kind in (AdamW, Adam, SGD, Adagrad):
        assert kind in FOLDING
        try:
            entry = fold(clipper, kind(clipper.engine.holders, lr=1e-3, fused=True))
        except (RuntimeError, ValueError, TypeError) as error:  # no parameters, or of a kind that it cannot fuse
            entry = {"folds": "no", "why": " ".join(str(error).split())}
        found.append(entry | {"optimizer": f"{kind.__name__}(fused=True)"})
    return found
