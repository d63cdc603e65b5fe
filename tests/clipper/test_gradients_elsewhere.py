"""Gradients that are not in `.grad`: in another attribute, behind a function, or reduced by the optimizer itself."""

import ast
from itertools import chain
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.errors import FAILURES
from distclip.gradients.storage import Storage
from distclip.step.engine import Engine
from support.layouts import backward, build, ddp, fsdp2, fsdp2_bf16_parameters
from support.oracle import same_tensors, true_norm
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import crossed

EXAMPLE = Path(__file__).parents[2] / "examples/optimizer_that_reduces.py"
LR = 0.5


def main_grad(name: str, parameter: Tensor) -> Tensor | None:
    return parameter.main_grad


WAYS = {"attribute": "main_grad", "function": main_grad}


def ddp_bf16() -> nn.Module:
    return DistributedDataParallel(build(dtype=torch.bfloat16))


class MainSGD(torch.optim.SGD):
    """Steps with ``main_grad``, as optimizers with fp32 accumulators do."""

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p -= (self.param_groups[0]["lr"] * p.main_grad).to(p.dtype)


def accumulate(model: nn.Module, scale: float) -> None:
    """Two backwards of one step, whose fp32 sum is in ``main_grad`` and nothing in ``.grad``."""
    for p in model.parameters():
        p.main_grad = None
    for micro in range(2):
        backward(model, micro, scale)
        for p in model.parameters():
            p.main_grad = p.grad.float() if p.main_grad is None else p.main_grad + p.grad.float()
            p.grad = None


def whole(tensors: Any) -> list[Tensor]:
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def accumulated(model: nn.Module) -> list[Tensor]:
    return whole(p.main_grad for p in model.parameters())


def outcome(call: Any) -> Any:
    try:
        return call()
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"


# ---- an attribute, a function ------------------------------------------------------------------------------


def elsewhere(make: Any) -> list[dict[str, Any]]:
    return [stepped(make(), way) for way in WAYS]


def stepped(model: nn.Module, way: str) -> dict[str, Any]:
    """A clipped step and one below the bound: norms, the accumulators around each, how far parameters moved."""
    clipper = distclip.Clipper(model, 1.0, gradients=WAYS[way])
    optimizer = MainSGD(model.parameters(), lr=LR)
    steps = []
    for scale in (30.0, 1e-3):
        accumulate(model, scale)
        clipper.verify()
        before, values = accumulated(model), whole(model.parameters())
        measured = clipper.measure().norm
        with count_collectives() as counts:
            report = clipper.step(optimizer)
        steps.append(
            {
                "norms": (measured, report.norm),
                "oracle": true_norm(before),
                "before": before,
                "after": accumulated(model),
                "moved": [old - new for old, new in zip(values, whole(model.parameters()), strict=True)],
                "collectives": dict(counts),
                "grad": [p.grad is None for p in model.parameters()],
            }
        )
    return {"steps": steps, "reports": clipper.report.to_dict()}


@pytest.mark.parametrize(("make", "size"), crossed([ddp, ddp_bf16, fsdp2, fsdp2_bf16_parameters], [1, 2, 4]))
def test_they_are_measured_and_scaled_where_they_are(make, size):
    results = run_ranks(elsewhere, size, make)
    assert same_bits([[way["reports"] for way in result] for result in results])
    for way in results[0]:
        for clips, step in zip((True, False), way["steps"], strict=True):
            check(clips, step)


def check(clips: bool, step: dict[str, Any]) -> None:
    oracle = step["oracle"]
    assert (oracle > 1.0) is clips
    assert [norm.item() for norm in step["norms"]] == pytest.approx([oracle] * 2, rel=2e-7)
    coef = 1.0 / (oracle + 1e-6) if clips else 1.0
    for before, after, moved in zip(step["before"], step["after"], step["moved"], strict=True):
        torch.testing.assert_close(after.double(), before.double() * coef, rtol=1e-6, atol=0.0)
        if moved.dtype == torch.float32:
            torch.testing.assert_close(moved.double(), LR * before.double() * coef, rtol=1e-4, atol=1e-6)
    assert same_tensors(step["before"], step["after"]) is not clips
    assert all(step["grad"]), "nothing is put into .grad"
    assert step["collectives"].keys() <= {"allreduce"}


def test_accumulators_are_not_rounded_to_the_dtype_of_their_parameters():
    model = build(dtype=torch.bfloat16)
    accumulate(model, 1.0)
    exact, rounded = accumulated(model), [g.bfloat16() for g in accumulated(model)]
    norm = distclip.Clipper(model, 1e9, gradients="main_grad").measure().norm.item()
    assert norm == pytest.approx(true_norm(exact), rel=2e-7)
    assert norm != pytest.approx(true_norm(rounded), rel=1e-6)


def test_a_fused_optimizer_that_reads_grad_applies_no_factor():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    accumulate(model, 30.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, values = accumulated(model), whole(model.parameters())
    report = distclip.Clipper(model, 1.0, gradients="main_grad").step(optimizer)
    assert report.coef < 1
    assert true_norm(accumulated(model)) == pytest.approx(true_norm(before) * report.coef.item(), rel=1e-6)
    assert same_tensors([v - 1 for v in values], whole(model.parameters()))


def attached(way: str) -> tuple[float, float, float]:
    model = fsdp2()
    optimizer = MainSGD(model.parameters(), lr=LR)
    clipper = distclip.attach(optimizer, model, 1.0, gradients=WAYS[way])
    accumulate(model, 30.0)
    oracle = true_norm(accumulated(model))
    optimizer.step()
    return oracle, clipper.report.norm.item(), true_norm(accumulated(model))


@pytest.mark.parametrize("way", WAYS)
def test_an_attached_optimizer_steps_with_them(way):
    for oracle, norm, after in run_ranks(attached, 2, way):
        assert oracle > 1
        assert norm == pytest.approx(oracle, rel=1e-6)
        assert after == pytest.approx(1.0, rel=1e-5)


def test_an_attached_step_with_a_closure_is_refused_since_it_could_not_be_skipped():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    distclip.attach(optimizer, model, 1.0, gradients="main_grad")
    with pytest.raises(RuntimeError, match=r"closure cannot be skipped where gradients= says"):
        optimizer.step(lambda: accumulate(model, 30.0))
    assert same_tensors(whole(model.parameters()), whole(build().parameters()))


def poisoned(make: Any) -> dict[str, Any]:
    model = make()
    clipper = distclip.Clipper(model, 1.0, gradients="main_grad")
    optimizer = MainSGD(model.parameters(), lr=LR)
    accumulate(model, 30.0)
    found = next(model.parameters()).main_grad
    local = found.to_local() if isinstance(found, DTensor) else found
    if make is ddp or dist.get_rank() == dist.get_world_size() - 1:
        local.view(-1)[0] = float("nan")
    before, values = accumulated(model), whole(model.parameters())
    report = clipper.step(optimizer)
    after = [g.nan_to_num() for g in accumulated(model)]
    kept = same_tensors([g.nan_to_num() for g in before], after) and same_tensors(values, whole(model.parameters()))
    culprit = clipper.culprit.parameter
    accumulate(model, 30.0)
    return {"skips": [report.skip.item(), clipper.step(optimizer).skip.item()], "kept": kept, "culprit": culprit}


@pytest.mark.parametrize("make", [ddp, fsdp2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_that_is_not_finite_is_skipped_by_all_and_names_the_parameter(make, size):
    expected = {"skips": [True, False], "kept": True, "culprit": "embed.weight"}
    assert run_ranks(poisoned, size, make) == [expected] * size


# ---- a rank without a gradient, and what is refused --------------------------------------------------------


def without_one(make: Any, way: str) -> Any:
    """Rank 1 lacks the gradient of the embedding: zeros where it is cut, an error where every rank has all of it."""
    model = make()
    clipper = distclip.Clipper(model, 1.0, gradients=WAYS[way])
    accumulate(model, 30.0)
    embedding = next(model.parameters())
    if dist.get_rank() == 1 and isinstance(embedding, DTensor):
        embedding.main_grad.to_local().zero_()
    oracle = true_norm(accumulated(model))
    if dist.get_rank() == 1:
        embedding.main_grad = None
    return oracle, outcome(lambda: clipper.clip_().norm.item())


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_without_a_gradient(way):
    for oracle, norm in run_ranks(without_one, 2, fsdp2, way):
        assert norm == pytest.approx(oracle, rel=2e-7)
    for _, said in run_ranks(without_one, 2, ddp, way):
        assert said.startswith("LayoutError: the ranks of the clipping group do not agree")
        assert "rank 1: step 0, " in said
        assert "without a gradient of embed.weight" in said


def expanded(gradient: Tensor) -> Tensor:
    return gradient[:1].expand(gradient.shape)


def pending(gradient: DTensor) -> DTensor:
    return DTensor.from_local(torch.ones(gradient.shape), gradient.device_mesh, [Partial()])


def local_shard(gradient: DTensor) -> Tensor:
    return gradient.to_local()


def one_row(gradient: Tensor) -> Tensor:
    return gradient[:1]


def a_number(gradient: Tensor) -> float:
    return 1.0


def nothing(gradient: Tensor) -> None:
    return None


def demanding(name: str, parameter: Tensor) -> Tensor:
    if parameter.main_grad is None:
        raise KeyError(name)
    return parameter.main_grad


def refused(make: Any, gradients: Any, spoil: Any, ranks: tuple[int, ...]) -> dict[str, Any]:
    """What three calls say where the embedding's gradient was spoilt on ``ranks``, and what the next one does."""
    model = make()
    clipper = distclip.Clipper(model, 1.0, gradients=gradients)
    accumulate(model, 30.0)
    embedding = next(model.parameters())
    good = embedding.main_grad
    oracle = true_norm(accumulated(model))
    if dist.get_rank() in ranks:
        embedding.main_grad = spoil(good)
    said = [outcome(call) for call in (clipper.measure, clipper.clip_, clipper.verify)]
    embedding.main_grad = good
    return {
        "said": said,
        "oracle": oracle,
        "norm": outcome(lambda: clipper.clip_().norm.item()),
        "steps": clipper.steps,
    }


REFUSED = {
    "in other memory": (ddp, main_grad, expanded, "gradients= returned for embed.weight would have to be"),
    "in other placements": (fsdp2, main_grad, pending, "gradients= returned for embed.weight would have to be"),
    "of another kind": (fsdp2, "main_grad", local_shard, "embed.weight is a plain tensor, its parameter a DTensor"),
    "of another size": (ddp, "main_grad", one_row, "12 elements for embed.weight of 444: where each rank has"),
    "no tensor": (ddp, "main_grad", a_number, "gradients= has a float for embed.weight"),
    "no tensor from a function": (ddp, main_grad, a_number, "gradients= has a float for embed.weight"),
    "an error of the function": (ddp, demanding, nothing, "KeyError: 'embed.weight'"),
}


@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=["on one rank", "on all"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_the_gradient_is_refused_on_all_ranks_and_changes_nothing(case, ranks):
    make, gradients, spoil, message = REFUSED[case]
    for rank, result in enumerate(run_ranks(refused, 2, make, gradients, spoil, ranks)):
        for said in result["said"]:
            assert message in said if rank in ranks else "rank 1: stopped: " in said
        assert result["norm"] == pytest.approx(result["oracle"], rel=2e-7)
        assert result["steps"] == 1


def misnamed(declared: bool) -> list[Any]:
    model = ddp()
    clipper = distclip.Clipper(model, 1.0, gradients="main_gard")
    if declared and dist.get_rank() == 1:
        next(model.parameters()).main_gard = None
    accumulate(model, 30.0)
    return [outcome(call) for call in (clipper.measure, clipper.clip_, clipper.verify)]


def test_an_attribute_that_no_parameter_has_is_refused():
    for said in chain(*run_ranks(misnamed, 2, False)):
        assert said.startswith("LayoutError: no parameter has the attribute main_gard that gradients= names: give its")


def test_an_attribute_that_is_declared_may_hold_nothing():
    first, second = run_ranks(misnamed, 2, True)
    assert all("no parameter has the attribute main_gard" in said for said in first)
    assert all("rank 0: stopped: no parameter has the attribute main_gard" in said for said in second)


def test_a_grad_scaler_cannot_unscale_them():
    model = build()
    clipper = distclip.Clipper(model, 1.0, gradients="main_grad")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    accumulate(model, 30.0)
    before = accumulated(model)
    with pytest.raises(ValueError, match=r"gradients= is elsewhere: unscale that before"):
        clipper.step(MainSGD(model.parameters(), lr=LR), scaler=scaler)
    assert same_tensors(before, accumulated(model))
    assert clipper.step(MainSGD(model.parameters(), lr=LR), scaler=torch.amp.GradScaler("cpu", enabled=False)).coef < 1


def test_gradients_must_be_a_name_or_a_function():
    with pytest.raises(ValueError, match=r"gradients must be the name of an attribute"):
        distclip.Clipper(build(), 1.0, gradients=3)  # type: ignore[arg-type]


# ---- an optimizer that reduces in its step -----------------------------------------------------------------


def example() -> Any:
    """The class of the example, without its loop."""
    body = ast.parse(EXAMPLE.read_text(encoding="utf-8")).body
    shown = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(shown, []), EXAMPLE, "exec"), names)
    return names["ShardedAdamW"]


def even(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)


def loss_of(model: nn.Module, step: int, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Steps 0 and 2 are far above the bound of 1, the others below."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)[rows]
    return (0.1, 30.0)[step % 2 == 0] * (model(x) - x.flip(1)).square().mean()


def reduced_inside() -> dict[str, Any]:
    model = even()
    optimizer = example()(model, 1.0, lr=1e-2)
    rank, size = dist.get_rank(), dist.get_world_size()
    reports = []
    for step in range(4):
        loss_of(model, step, slice(rank * 16 // size, (rank + 1) * 16 // size)).backward()
        optimizer.step()
        optimizer.clipper.verify()
        reports.append(optimizer.clipper.report.to_dict())
        model.zero_grad()
    kept = whole(model.parameters())
    loss_of(model, 4, slice(0, 16)).backward()
    if rank == 1:
        next(model.parameters()).grad[0, 0] = float("nan")
    optimizer.step()
    skipped = optimizer.clipper.report.skip.item() and same_tensors(kept, whole(model.parameters()))
    return {"parameters": kept, "reports": reports, "skipped": skipped, "shown": repr(optimizer.clipper)}


def in_one_process() -> tuple[list[float], list[Tensor]]:
    """The same four steps in float64, with all rows."""
    model = even(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for step in range(4):
        loss_of(model, step, slice(0, 16), torch.float64).backward()
        norms.append(true_norm(p.grad for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norms[-1] + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
    return norms, whole(model.parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_the_example_of_an_optimizer_that_reduces_in_its_step_is_one_process(size):
    results = run_ranks(reduced_inside, size)
    norms, parameters = in_one_process()
    assert [norm > 1 for norm in norms] == [True, False, True, False]
    assert same_bits([(r["parameters"], r["reports"]) for r in results])
    assert [report["norm"] for report in results[0]["reports"]] == pytest.approx(norms, rel=1e-6)
    for found, exact in zip(results[0]["parameters"], parameters, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    assert all(r["skipped"] for r in results)
    assert "called by ShardedAdamW.step()" in results[0]["shown"]


def decided_first() -> dict[str, Any]:
    """Rows of the even parameters and all of the others: decided on at once, scaled one by one when they are needed."""
    model, rank, size = build(), dist.get_rank(), dist.get_world_size()
    cut = {p for p in model.parameters() if len(p) % size == 0}
    backward(model, 0, 30.0)
    for p in model.parameters():
        dist.all_reduce(p.grad)
    exact = whole(p.grad for p in model.parameters())
    rows = {p: p.grad.chunk(size)[rank].clone() if p in cut else p.grad for p in model.parameters()}

    def layout(name: str, p: Tensor) -> distclip.Layout | None:
        return distclip.Layout(1) if p in cut else None

    engine = Engine(model, 1.0, gradients=lambda name, p: rows[p], layout=layout)
    engine.verify()
    before = [row.clone() for row in rows.values()]
    found = engine.decide()
    untouched = same_tensors(before, list(rows.values()))
    for row in rows.values():
        found.apply_to([row])
    coef = found.report.coef.item()
    right = all(torch.allclose(a, b * coef, rtol=1e-6) for a, b in zip(rows.values(), before, strict=True))
    norm = found.report.norm.item()
    return {"oracle": true_norm(exact), "norm": norm, "kept": untouched, "right": right, "coef": coef, "cut": len(cut)}


@pytest.mark.parametrize("size", [2, 4])
def test_a_decision_may_be_applied_later_piece_by_piece(size):
    for result in run_ranks(decided_first, size):
        assert result["norm"] == pytest.approx(result["oracle"], rel=1e-6)
        assert result["coef"] == pytest.approx(1 / (result["oracle"] + 1e-6), rel=1e-6)
        assert result["coef"] < 1
        assert result["kept"]
        assert result["right"]
        assert 0 < result["cut"] < len(list(build().parameters()))


def with_a_scale(policy: distclip.Policy, dtype: torch.dtype, how: str) -> tuple[distclip.Report, list[Tensor]]:
    """The report on gradients that are multiplied by 1024, and what becomes of them, divided by that again."""
    model = build()
    backward(model, 0, 3.0)
    buffers = [(p.grad * 1024).to(dtype) for p in model.parameters()]
    engine = Engine(model, policy, gradients=Storage(lambda: buffers, buffers.__setitem__, lambda: 1024.0))
    if how == "clip_":
        return engine.clip_(), [buffer.double() / 1024 for buffer in buffers]
    if how == "begin":
        return engine.begin([torch.optim.SGD(model.parameters())]).report, [b.double() / 1024 for b in buffers]
    outcome = engine.decide()
    outcome.apply_to(buffers, unscale=how == "unscale")
    return outcome.report, [buffer.double() / (1 if how == "unscale" else 1024) for buffer in buffers]


@pytest.mark.parametrize("how", ["clip_", "begin", "apply_to", "unscale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("policy", [distclip.MaxNorm(0.5), distclip.ValueClip(0.1)], ids=repr)
def test_gradients_that_are_multiplied_by_a_scale_are_clipped_as_without(policy, dtype, how):
    model = build()
    backward(model, 0, 3.0)
    oracle = true_norm([p.grad for p in model.parameters()])
    plain = distclip.Clipper(model, policy).clip_()
    report, gradients = with_a_scale(policy, dtype, how)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert plain.norm.item() == pytest.approx(oracle, rel=1e-6)
    assert report.norm.item() == pytest.approx(oracle, rel=tolerance)
    for found, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad.double(), rtol=tolerance, atol=tolerance * 1e-2)


def test_several_optimizers_are_not_attached_where_nothing_shows_that_gradients_change():
    model = build()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^attach takes one optimizer where gradients= .*call Clipper\.step"):
        distclip.attach(optimizers, model, 1.0, gradients="main_grad")


def test_a_step_that_is_running_cannot_be_skipped_without_its_gradients():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, 1.0, gradients="main_grad")
    for parameter in model.parameters():
        parameter.main_grad = torch.ones_like(parameter)
    engine.clip_([optimizer])
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"^clip_\(\) was called inside the closure of SGD\.step\(\)"):
        optimizer.step(lambda: engine.clip_([optimizer]).norm)


@pytest.mark.parametrize("scale", [0.0, -2.0, nan, inf])
def test_a_scale_that_is_none_is_refused(scale):
    model = build()
    parameters = list(model.parameters())
    storage = Storage(lambda: [torch.ones_like(p) for p in parameters], lambda *_: None, scale=lambda: scale)
    with pytest.raises(ValueError, match=r"^Storage\.scale\(\) must be "):
        Engine(model, 1.0, gradients=storage).measure()


@pytest.mark.parametrize("p", [1.0, 2.0, 64.0, inf])
def test_a_scale_may_be_a_tensor_and_its_power_out_of_range(p):
    model = build()
    parameters = list(model.parameters())
    scale = torch.tensor(65536.0)
    storage = Storage(lambda: [torch.ones_like(q) for q in parameters], lambda *_: None, scale=lambda: scale)
    report = Engine(model, 1.0, norm_type=p, gradients=storage).measure()
    assert report.norm.item() == pytest.approx(true_norm([torch.ones_like(q) for q in parameters], p) / 65536, rel=1e-6)
