"""The matrix: every layout, dtype, p and state of the gradients against the float64 oracle, on 2, 4 and 8 ranks.

Every run has all layouts with ordinary fp32 gradients, and some with each dtype and state; all of it is ``thorough``.
"""

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite, nan

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import distclip
from distclip.gradients.realign import is_candidate
from distclip.plan.build import Plan
from distclip.plan.copies import has_copies
from support.oracle import same_tensors, true_norm
from support.parallel import EIGHT, FOUR, THREE, TWO, united
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import most, rare, sample

P = (0.5, 1.0, 2.0, 3.0, inf)
TIMES = {"ordinary": 1.0, "tiny": 2.0**-18, "huge": 2.0**45}  # exact
AFTER = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
Kept = tuple[torch.Tensor, torch.Tensor | None]  # a parameter, and what its gradient was
LAYOUTS = [
    pytest.param(layout, size, id=f"{layout.__name__}-{size}") for size, ls in ((2, TWO), (4, FOUR)) for layout in ls
]
ON_THREE = [pytest.param(layout, 3, id=f"{layout.__name__}-3") for layout in THREE]
ON_EIGHT = sample(
    [pytest.param(layout, 8, id=f"{layout.__name__}-8") for layout in EIGHT],
    *("hsdp_tp_sequence-8", "pp_fsdp2_tp-8", "three_axes-8"),
)
SOME = [p for p in LAYOUTS if p.id in ("by_hand-4", "fsdp2_tp-4", "pp_gpipe-2", "tp_sequence-2", "fsdp1_full_flat-2")]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass
class Bound:
    """A policy whose bound a test moves: making a Clipper for each took a quarter of the time here."""

    max_norm: float = inf

    def needs(self):
        return ()

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        return distclip.Decision(torch.full_like(statistics.norm(), self.max_norm)), state


def clipped(layout, dtype: torch.dtype, *states: str) -> list[dict[str, object]]:
    """What the function and the Clipper make of gradients in each of these states, for every p."""
    job = layout(dtype, 30.0)
    job.backward()
    whole = united(job)
    bound, norms = Bound(), {p: true_norm(whole, p) for p in P}
    clippers = {p: distclip.Clipper(job.parts, bound, norm_type=p, **job.options) for p in P}
    plan, holders = clippers[2.0].engine.plan, clippers[2.0].engine.holders  # TP under DDP and FSDP1 hide them
    kept = [(h, None if h.grad is None else h.grad.detach().clone()) for h in holders]
    along = "split_over" in job.options
    looks = has_copies(plan) or clippers[inf].engine.plan.copies is not None
    compares = Counter(allreduce=looks + along)  # in calls 1, 2, 4, ... of a Clipper
    compares["alltoallbase"] = 2 * (dist.get_world_size() - 1).bit_length() * along

    def function(max_norm: float, p: float) -> torch.Tensor:
        return distclip.clip_grad_norm_(job.parts, max_norm, p, **job.options)

    def clipper(max_norm: float, p: float) -> torch.Tensor:
        bound.max_norm = max_norm
        return clippers[p].clip_().norm

    tolerance = 2e-7 if job.exact else 1e-6 if dtype == torch.float32 else 2e-2
    results = []
    for call, state in zip(range(2, 20, 2), states, strict=False):
        oracle = {p: TIMES[state] * norm for p, norm in norms.items()}
        found = {"oracle": oracle, "realigns": job.realigns, "tolerance": tolerance}
        for clip in (function, clipper):
            expected = Counter(allreduce=1) + (compares if clip is clipper and call in (2, 4) else Counter())
            found[clip.__name__] = {"expected": expected, **calls_of(clip, function, kept, oracle, TIMES[state])}
        results.append(found)
    put_back(kept, 1.0)
    one = clippers.pop(2.0)
    clippers.clear()  # verify() tolerates no other Clipper of these parameters
    one.verify()
    return results


def calls_of(clip, function, kept: list[Kept], oracle: dict[float, float], times: float) -> dict[str, object]:
    """The norms, what clipping leaves, whether an unclipped step kept bits, and the collectives of the last call."""
    norms, untouched, after = {}, {}, {}
    for p, clips in product(P, (False, True)):
        max_norm = oracle[p] / 3 if clips else 2 * oracle[p]
        put_back(kept, times)
        before = [local(h.grad).clone() for h, _ in kept if h.grad is not None]
        with count_collectives() if (p, clips) == (P[-1], True) else nullcontext() as counts:
            norms[p, clips] = clip(max_norm, p)
        if clips:
            after[p] = function(inf, p).item() / max_norm
        else:
            untouched[p] = same_tensors(before, [local(h.grad) for h, _ in kept if h.grad is not None])
    return {"norms": norms, "untouched": untouched, "after": after, "collectives": dict(counts)}


def put_back(kept: list[Kept], times: float) -> None:
    for holder, gradient in kept:
        holder.grad = None if gradient is None else gradient.clone()
        if holder.grad is not None and times != 1.0:
            local(holder.grad).mul_(times)


def check(ranks: list[list[dict]], dtype: torch.dtype) -> None:
    for results in zip(*ranks, strict=True):  # of one state
        check_state(results, dtype)


def check_state(results: tuple[dict, ...], dtype: torch.dtype) -> None:
    assert same_bits([r["function"]["norms"] for r in results])
    assert same_bits([r["clipper"]["norms"] for r in results])
    for name in ("function", "clipper"):
        for p in P:
            oracle = results[0]["oracle"][p]
            assert oracle > 0, "a vacuous case"
            for clips in (False, True):
                norm = results[0][name]["norms"][p, clips].item()
                assert norm == pytest.approx(oracle, rel=results[0]["tolerance"]), p
            left = norm / (norm + 1e-6)  # of the bound, by torch's own formula
            error = AFTER[dtype] * (2 if p < 1 else 1)
            assert results[0][name]["after"][p] == pytest.approx(left, rel=error), p
            assert results[0]["realigns"] or all(r[name]["untouched"][p] for r in results)
        if not results[0]["realigns"]:
            assert all(r[name]["collectives"] == r[name]["expected"] for r in results)


ORDINARY, EXTREME = ("ordinary",), ("tiny", "huge")


@pytest.mark.parametrize(
    ("dtype", "states"),
    [
        pytest.param(torch.float32, ORDINARY, id="float32"),
        rare(torch.float32, EXTREME, id="float32-extreme"),
        rare(torch.bfloat16, tuple(TIMES), id="bfloat16"),
    ],
)
@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_norm_and_clipping_are_those_of_one_process(layout, size, dtype, states):
    check(run_ranks(clipped, size, layout, dtype, *states), dtype)


@pytest.mark.parametrize(
    ("dtype", "states"),
    [
        pytest.param(torch.float64, ORDINARY, id="float64"),
        pytest.param(torch.float32, EXTREME, id="float32"),
        pytest.param(torch.bfloat16, EXTREME, id="bfloat16"),
        pytest.param(torch.float16, ORDINARY, id="float16"),
    ],
)
@pytest.mark.parametrize(("layout", "size"), SOME)
def test_the_same_in_other_dtypes_and_of_tiny_and_huge_gradients(layout, size, dtype, states):
    check(run_ranks(clipped, size, layout, dtype, *states), dtype)


@pytest.mark.parametrize(("layout", "size"), ON_THREE)
def test_the_same_on_three_ranks_that_nothing_divides_by(layout, size):
    check(run_ranks(clipped, size, layout, torch.float32, "ordinary"), torch.float32)


@pytest.mark.parametrize(("layout", "size"), ON_EIGHT)
def test_the_same_on_eight_ranks(layout, size):
    check(run_ranks(clipped, size, layout, torch.float32, "ordinary"), torch.float32)


def troubled(layout) -> dict[str, object]:
    """A NaN on the last rank, then no gradient at all there."""
    job = layout(torch.float32, 30.0)
    job.backward()
    last = dist.get_rank() == dist.get_world_size() - 1
    clipper = distclip.Clipper(job.parts, 1.0, **job.options)
    clipper.measure()  # brings gradients into place
    holders = clipper.engine.holders
    mine = [i for i in range(len(clipper.engine.plan.pieces)) if gradient_of(clipper, i).numel()]
    if last:
        gradient_of(clipper, mine[-1]).view(-1)[0] = nan
    before = [gradient_of(clipper, i).clone() for i in mine]
    report = clipper.clip_()
    result = {
        "skip": report.skip.item(),
        "culprit": str(report.culprit),
        "untouched": same_bits([before, [gradient_of(clipper, i) for i in mine]]),
        "expected": blamed(clipper.engine.plan, mine[-1]) if mine else "nothing",
    }
    for holder in holders:
        holder.grad = None
    job.backward()
    if last:
        for holder in holders:
            holder.grad = None
    result["norms"] = [norm_or_error(job, p) for p in (2.0, inf)]
    result["copies"] = any(is_copied(clipper.engine.plan, i) for i in range(len(clipper.engine.plan.pieces)))
    return result


def blamed(plan: Plan, i: int) -> str:
    """How the culprit begins, the last rank: what FSDP has summed and cut may have come from any."""
    piece, last = plan.pieces[i], plan.group.size - 1
    if plan.replicas[i] == 1 and (piece.reduced or piece.flat_over):
        return f"{plan.label(i)} has NaN in its reduced gradient, held by rank {last}; distclip.find_source(model) "
    return f"{plan.label(i)} on rank {last} has NaN in its gradient"


def is_copied(plan: Plan, i: int) -> bool:
    """Whether every rank holds all of piece ``i``, and no gradient of it can be a term of a sum not made yet."""
    return plan.known_to_all[i] and plan.replicas[i] == plan.group.size and not is_candidate(plan.pieces[i])


def norm_or_error(job, p: float) -> float | str:
    try:
        return distclip.clip_grad_norm_(job.parts, inf, p, **job.options).item()
    except distclip.LayoutError as error:
        return str(error)


def gradient_of(clipper: distclip.Clipper, index: int) -> torch.Tensor:
    """What this rank has of the gradient of one piece: empty where there is none."""
    piece, gradient = clipper.engine.plan.pieces[index], clipper.engine.holders[clipper.engine.plan.sources[index]].grad
    if gradient is None:
        return torch.empty(0)
    return local(gradient) if piece.span is None else local(gradient)[piece.span]


@pytest.mark.parametrize(
    ("layout", "size"),
    most(
        LAYOUTS,
        *("fsdp1_grad_op-2", "fsdp1_grad_op_flat-2", "fsdp1_full-4", "fsdp1_full_flat-4", "fsdp1_hybrid_zero2-4"),
        *("fsdp1_copies_flat-4", "fsdp1_experts-4", "cp_fsdp2-4"),
    ),
)
def test_a_bad_number_is_named_and_a_rank_without_gradients_takes_part(layout, size):
    """With zeros for what only it holds; copies that one rank lacks are an error on all."""
    results = run_ranks(troubled, size, layout)
    for r in results:
        assert r["skip"] is True
        assert r["culprit"].startswith(results[-1]["expected"])
        assert r["untouched"]
        for norm in r["norms"]:
            if r["copies"]:  # which one rank lacks
                assert re.search(rf"; rank {size - 1}: .* without a gradient of ", norm)
            else:
                assert isfinite(norm)
    assert same_bits([r["norms"] for r in results])
