"""The promise: on every layout the norm is that of all gradients as one vector, and clipping is one factor for all."""

from collections.abc import Callable
from math import inf

import pytest
import torch
from torch import nn

import distclip
from support.layouts import REPLICATED, SHARDED, backward, fsdp2_and_plain
from support.oracle import same_tensors, true_norm, whole_gradients
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import crossed

P = (1.0, 2.0, 3.0, inf)
USES = {"function": P, "module": (2.0, inf), "clipper": (1.0, 2.0, inf)}  # and of which norm types


def refill(model: nn.Module, values: list[torch.Tensor | None]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.grad = None if value is None else value.clone()


def measured(build: Callable[[], nn.Module]) -> dict[str, object]:
    """Everything the tests below look at, from one backward on this rank."""
    model = build()
    backward(model, scale=30.0)
    kept = [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    before = whole_gradients(model.parameters())
    result: dict[str, object] = {"oracle": {p: true_norm(before, p) for p in P}, "grads": len(before)}

    for name, use in {
        "function": lambda p, bound: distclip.clip_grad_norm_(model.parameters(), bound, p),
        "module": lambda p, bound: distclip.clip_grad_norm_(model, bound, p),
        "clipper": lambda p, bound: distclip.Clipper(model, bound, norm_type=p).clip_().norm,
    }.items():
        norms, after, untouched = {}, {}, {}
        for p in USES[name]:
            for clips, bound in ((False, 2 * result["oracle"][p]), (True, result["oracle"][p] / 3)):
                refill(model, kept)
                norms[p, clips] = use(p, bound)
                now = whole_gradients(model.parameters())
                if clips:
                    after[p] = true_norm(now, p) / bound
                else:
                    untouched[p] = same_tensors(now, before)
        result[name] = {"norms": norms, "after": after, "untouched": untouched}

    refill(model, kept)
    with count_collectives() as function:
        distclip.clip_grad_norm_(model.parameters(), inf)
    clipper = distclip.Clipper(model, inf)
    with count_collectives() as first:
        clipper.clip_()
    clipper.clip_()
    with count_collectives() as step:
        clipper.clip_()
    result["collectives"] = {"function": dict(function), "clipper": dict(step), "first": dict(first)}
    clipper.verify()
    return result


@pytest.mark.parametrize(("build", "size"), crossed(REPLICATED + SHARDED, (2, 3)))
def test_the_norm_is_that_of_the_whole_model(build, size):
    results = run_ranks(measured, size, build)
    low_precision = build.__name__ == "fsdp2_bf16_parameters"
    for use in USES:
        assert same_bits([r[use]["norms"] for r in results])
        for p in USES[use]:
            oracle = results[0]["oracle"][p]
            assert oracle > 1.0, "a vacuous case"
            for clips in (False, True):
                assert results[0][use]["norms"][p, clips].item() == pytest.approx(oracle, rel=2e-7)
            assert results[0][use]["after"][p] == pytest.approx(1.0, rel=2**-8 if low_precision else 1e-6)
            assert all(r[use]["untouched"][p] for r in results)
    for r in results:
        talks, copies = build in SHARDED, build in REPLICATED or build is fsdp2_and_plain
        assert r["collectives"]["function"] == ({"allreduce": 1} if talks else {})
        assert r["collectives"]["clipper"] == {"allreduce": 1}
        assert r["collectives"]["first"] == {"allreduce": 2 if copies else 1}, "the first call compares copies"


def on_one_process() -> dict[str, object]:
    torch.distributed.destroy_process_group()
    from support.layouts import one_process

    return measured(one_process)


def test_one_process_without_torch_distributed():
    (r,) = run_ranks(on_one_process, 1, fresh=True)
    assert r["collectives"] == {"function": {}, "clipper": {}, "first": {}}
    for p in USES["clipper"]:
        assert r["clipper"]["norms"][p, True].item() == pytest.approx(r["oracle"][p], rel=2e-7)
        assert r["function"]["after"][p] == pytest.approx(1.0, rel=1e-6)
        assert r["function"]["untouched"][p]
