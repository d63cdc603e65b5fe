"""A Clipper in a model's life: parameters that are replaced or added, optimizers that hold others, copies."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, AdamW

import distclip
from distclip.layouts.model import held_in
from support import layouts
from support.layouts import backward, build
from support.oracle import same_tensors, true_norm, whole_gradients
from support.ranks import run_ranks, same_bits


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


def back(model: nn.Module, scale: float = 10.0) -> None:
    torch.manual_seed(0)
    (model(torch.randn(8, 4)) * scale).square().sum().backward()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Loop:
    """A model and its optimizer, some steps into training, by one of the ways to clip."""

    def __init__(self, way: str, fused: bool = False) -> None:
        self.way, self.model = way, small()
        self.optimizer = SGD(self.model.parameters(), lr=1.0, fused=fused)
        self.clipper = distclip.Clipper(self.model, 1.0) if way != "attach" else self.attach()
        for _ in range(3):
            back(self.model, 0.1)
            self.step()
            self.optimizer.zero_grad()

    def attach(self) -> distclip.Clipper:
        return distclip.attach(self.optimizer, self.model, 1.0)

    def step(self) -> None:
        if self.way == "step":
            self.clipper.step(self.optimizer)
        elif self.way == "clip_":
            self.clipper.clip_()
            self.optimizer.step()
        else:
            self.optimizer.step()


def assign(loop: Loop) -> None:
    loop.model.load_state_dict({k: v.clone() for k, v in loop.model.state_dict().items()}, assign=True)


def assign_in_a_child(loop: Loop) -> None:
    loop.model[1].load_state_dict({k: v.clone() for k, v in loop.model[1].state_dict().items()}, assign=True)


def one_by_hand(loop: Loop) -> None:
    loop.model[0].bias = nn.Parameter(torch.zeros(4))


def past_the_module(loop: Loop) -> None:
    loop.model[0]._parameters["bias"] = nn.Parameter(torch.zeros(4))  # as fully_shard and Module.to do


def append(loop: Loop) -> None:
    loop.model.append(nn.Linear(4, 4))
    loop.optimizer.add_param_group({"params": list(loop.model[2].parameters())})


def adapter(loop: Loop) -> None:
    loop.model[0].adapter = nn.Linear(4, 4)  # in a leaf that keeps its own parameters, as LoRA
    loop.model[0].register_forward_hook(lambda module, inputs, output: output + module.adapter(inputs[0]))
    loop.optimizer.add_param_group({"params": list(loop.model[0].adapter.parameters())})


def parametrize(loop: Loop) -> None:
    weight_norm(loop.model[0])


def replace_a_layer(loop: Loop) -> None:
    loop.model[1] = nn.Linear(4, 4)


def remove_a_layer(loop: Loop) -> None:
    del loop.model[1]


def overwrite(loop: Loop) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        loop.model.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


CHANGES = [
    assign,
    assign_in_a_child,
    one_by_hand,
    past_the_module,
    append,
    adapter,
    parametrize,
    replace_a_layer,
    remove_a_layer,
    overwrite,
]


@pytest.mark.parametrize("rebuild", [True, False], ids=["new_optimizer", "old_optimizer"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("way", ["step", "clip_", "attach"])
def test_a_model_that_has_changed_after_the_first_steps_is_refused(way, change, rebuild):
    loop = Loop(way)
    change(loop)
    if rebuild and way != "attach":
        loop.optimizer = SGD(loop.model.parameters(), lr=1.0)
    back(loop.model)
    before = values(loop.model)
    with pytest.raises(distclip.LayoutError, match="since the Clipper was built: build it anew"):
        loop.step()
    assert same_tensors(before, values(loop.model))
    with pytest.raises(distclip.LayoutError, match="build it anew"):
        loop.clipper.measure()
    with pytest.raises(distclip.LayoutError, match="build it anew"):
        loop.clipper.verify()


@pytest.mark.parametrize("way", ["step", "clip_", "attach"])
def test_what_leaves_the_parameters_in_place_is_no_change(way):
    loop = Loop(way)
    loop.model[0].register_buffer("seen", torch.zeros(1))
    loop.model.load_state_dict(loop.model.state_dict())
    loop.model[0].weight.requires_grad_(False)
    loop.model[1].append(nn.GELU())
    loop.model.to(torch.float64).to(torch.float32)
    loop.optimizer.zero_grad()
    back(loop.model)
    want = true_norm(whole_gradients(loop.model.parameters()))
    loop.step()
    assert loop.clipper.report.norm.item() == pytest.approx(want, rel=1e-6)


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


@pytest.mark.parametrize("way", ["step", "clip_", "attach"])
def test_frozen_modules_come_and_go_while_they_stay_frozen(way):
    loop = Loop(way)
    loop.model.zero_grad()
    loop.model[0].target = frozen_copy(loop.model[0])
    loop.clipper.measure()
    for _ in range(3):
        loop.model[0].target = frozen_copy(loop.model[0].target)  # as DQN and BYOL do
        loop.optimizer.zero_grad()
        back(loop.model)
        want = true_norm(whole_gradients(p for p in loop.model.parameters() if p.grad is not None))
        before = values(loop.model)
        loop.step()
        assert loop.clipper.report.norm.item() == pytest.approx(want, rel=1e-6)
        moved = [a - b for a, b in zip(values(loop.model), before, strict=True)]
        assert true_norm(moved) == pytest.approx(1.0, rel=1e-5)
    loop.model[0].target.weight.requires_grad_(True)
    with pytest.raises(distclip.LayoutError, match=r"the model has another 0\.target\.weight"):
        loop.step()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("way", ["step", "attach"])
def test_a_module_that_was_frozen_from_the_start_may_be_replaced_by_a_frozen_one(way, trains):
    model = small()
    model[0].teacher = frozen_copy(model[1])
    optimizer = SGD(model.parameters(), lr=1.0)
    clipper = distclip.attach(optimizer, model, 1.0) if way == "attach" else distclip.Clipper(model, 1.0)
    step = optimizer.step if way == "attach" else lambda: clipper.step(optimizer)
    back(model)
    step()
    old, model[0].teacher = model[0].teacher, frozen_copy(model[1]).requires_grad_(trains)
    if trains:
        with pytest.raises(distclip.LayoutError, match=r"the model has another 0\.teacher"):
            step()
        return
    step()
    old.requires_grad_(True)  # elsewhere, and its gradient would be in the norm
    with pytest.raises(distclip.LayoutError, match="the model lost parameters"):
        step()


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_may_hold_frozen_parameters_that_are_new(fused):
    model = small()
    clipper = distclip.Clipper(model, 1.0)
    model[0].target = frozen_copy(model[0])
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    back(model)
    assert clipper.step(optimizer).coef.item() < 1
    model[0].target.bias.requires_grad_(True)
    with pytest.raises(distclip.LayoutError, match="the model has another"):
        clipper.step(optimizer)


def test_a_model_in_which_nothing_has_changed_is_not_walked_through(monkeypatch):
    loop = Loop("step")
    monkeypatch.setattr("distclip.layouts.model.held_in", lambda models: pytest.fail("walked through again"))
    back(loop.model)
    loop.step()
    loop.clipper.measure()


def changed_on_one_rank(change: str) -> tuple[str, bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if change == "fully_shard":
        fully_shard(model[1], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdamW(model.parameters())
    clipper = distclip.Clipper(model, 1.0)
    back(model)
    for p in model.parameters():
        if change != "fully_shard":
            dist.all_reduce(p.grad)
    for p in model[0].parameters():
        if change == "fully_shard":
            dist.all_reduce(p.grad)
    clipper.step(optimizer)
    if change == "fully_shard":
        fully_shard(model[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif dist.get_rank() == 1:
        model[0].bias = nn.Parameter(torch.zeros(4))
    before = [p.detach().clone() for p in model.parameters()]
    try:
        clipper.step(optimizer)
    except distclip.LayoutError as error:
        return str(error), same_tensors(before, [p.detach().clone() for p in model.parameters()])
    return "no error", False


@pytest.mark.parametrize("size", [2, 4])
def test_a_parameter_replaced_on_one_rank_is_an_error_on_all(size):
    results = run_ranks(changed_on_one_rank, size, "assign")
    assert all(kept for _, kept in results)
    assert "the model has another 0.bias" in results[1][0]
    assert all("rank 1: stopped: the model has another 0.bias" in results[r][0] for r in range(size) if r != 1)


def test_a_module_sharded_after_the_first_step_is_an_error():
    for message, kept in run_ranks(changed_on_one_rank, 2, "fully_shard"):
        assert "the model has another 0.weight since the Clipper was built" in message
        assert kept


def fsdp1() -> nn.Module:
    return FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True)


def walks_in_steps_of(build: Callable[[], nn.Module]) -> tuple[list[int], list[float], list[float]]:
    """How often a model is walked through in steps 0 to 3, their norms, and the true ones."""
    model, walks, found, want = build(), [], [], []
    optimizer = SGD(model.parameters(), lr=0.0)
    clipper = distclip.Clipper(model, 1.0)
    for step in range(4):
        backward(model, step)
        if not isinstance(model, FullyShardedDataParallel):
            want.append(true_norm(whole_gradients(p for p in model.parameters())))
        with patch("distclip.layouts.model.held_in", wraps=held_in) as walk:
            found.append(clipper.step(optimizer).norm.item())
        walks.append(walk.call_count)
        optimizer.zero_grad()
    return walks, found, want


@pytest.mark.parametrize(
    "layout", [layouts.ddp, layouts.fsdp2, layouts.fsdp2_keep_unsharded, fsdp1], ids=lambda layout: layout.__name__
)
def test_wrappers_that_swap_parameters_are_walked_through_once(layout):
    results = run_ranks(walks_in_steps_of, 2, layout)
    for walks, found, want in results:
        assert walks == [1, 0, 0, 0]
        assert found == results[0][1]
        assert found[: len(want)] == pytest.approx(want, rel=1e-6)


def step_on(model: nn.Module, optimizer: SGD, way: str) -> distclip.Report:
    if way == "attach":
        clipper = distclip.attach(optimizer, model, 1.0)
        optimizer.step()
        assert clipper.report is not None
        return clipper.report
    return distclip.Clipper(model, 1.0).step(optimizer)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("way", ["step", "attach"])
@pytest.mark.parametrize("own", [True, False], ids=["some_are_ours", "none_is_ours"])
def test_an_optimizer_never_steps_parameters_that_nobody_clips(own, way, fused):
    model, other = small(), small()
    back(model)
    back(other)
    before = values(model), values(other)
    held = [*(model.parameters() if own else ()), *other.parameters()]
    count = "4 of 8" if own else "4 of 4"
    with pytest.raises(
        distclip.LayoutError, match=re.escape(f"SGD holds {count} parameters, first one of shape (4, 4)")
    ):
        step_on(model, SGD(held, lr=1.0, fused=fused), way)
    assert same_tensors(before[0], values(model))
    assert same_tensors(before[1], values(other))


def test_two_clippers_may_share_an_optimizer_and_must_not_swap_theirs():
    left, right = small(), small()
    clippers = [distclip.Clipper(model, 1.0) for model in (left, right)]
    for model in (left, right):
        back(model)
    together = SGD([*left.parameters(), *right.parameters()], lr=1.0)
    before = values(left), values(right)
    clippers[0].clip_()
    clippers[1].step(together)
    for model, kept in zip((left, right), before, strict=True):
        assert true_norm([a - b for a, b in zip(values(model), kept, strict=True)]) == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(distclip.LayoutError, match="SGD holds 4 of 4 parameters"):
        clippers[0].step(SGD(right.parameters(), lr=1.0))


@pytest.mark.parametrize("way", ["step", "attach"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_only_says_which_parameters_are_clipped(fused, way):
    model = small()
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    options = {"only": lambda name, parameter: name.startswith("0.")}
    attached = way == "attach"
    clipper = distclip.attach(optimizer, model, 1.0, **options) if attached else distclip.Clipper(model, 1.0, **options)
    back(model)
    want = true_norm(whole_gradients(model[0].parameters()))
    left = true_norm(whole_gradients(model[1].parameters()))
    assert min(want, left) > 10
    before = values(model)
    if attached:
        optimizer.step()
    else:
        clipper.step(optimizer)
    assert clipper.report.norm.item() == pytest.approx(want, rel=1e-6)
    moved = [a - b for a, b in zip(values(model), before, strict=True)]
    assert true_norm(moved[:2]) == pytest.approx(1.0, rel=1e-5)
    assert true_norm(moved[2:]) == pytest.approx(left, rel=1e-5)
    model.append(nn.Linear(4, 4))
    with pytest.raises(distclip.LayoutError, match=r"the model has another 2\.weight"):
        clipper.measure()


def only_on_ranks(flat: bool) -> tuple[float, float] | str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if flat:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        clipper = distclip.Clipper(model, 1.0, only=lambda name, parameter: name.startswith("0."))
    except distclip.LayoutError as error:
        return str(error)
    back(model)
    chosen = [p for name, p in model.named_parameters() if name.startswith("0.")]
    want = true_norm([p.grad.full_tensor() for p in chosen])
    return clipper.measure().norm.item(), want


def test_only_chooses_among_shards():
    results = run_ranks(only_on_ranks, 2, False)
    assert same_bits([torch.tensor(got) for got, _ in results])
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-6)


def test_only_cannot_cut_a_flat_parameter_of_fsdp1():
    for message in run_ranks(only_on_ranks, 2, True):
        assert "only=... leaves out 1.weight, which FSDP1 keeps in one flat parameter" in message


def only_on_one_rank() -> str:
    model = small()
    only = (lambda name, parameter: True) if dist.get_rank() else None
    with pytest.raises(ValueError, match="only must be the same on every rank") as caught:
        distclip.Clipper(model, 1.0, only=only)
    return str(caught.value)


def test_only_on_one_rank_is_an_error_on_all():
    assert len(run_ranks(only_on_one_rank, 2)) == 2


WAYS_TO_COPY = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a dictionary": lambda thing: copy.deepcopy({"a": 1, "thing": thing}),
    "pickle": pickle.dumps,
    "pickle protocol 2": lambda thing: pickle.dumps(thing, 2),
    "torch.save": lambda thing: torch.save({"trainer": thing}, io.BytesIO()),
}


@pytest.mark.parametrize("how", WAYS_TO_COPY)
@pytest.mark.parametrize("way", ["step", "attach"])
def test_a_clipper_is_not_copied(way, how):
    clipper = Loop(way).clipper
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*load_state_dict"):
        WAYS_TO_COPY[how](clipper)


@pytest.mark.parametrize("how", WAYS_TO_COPY)
def test_an_attached_optimizer_is_not_copied(how):
    loop = Loop("attach")
    scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1)
    for thing in (loop.optimizer, {"model": loop.model, "optimizer": loop.optimizer}, scheduler):
        if how == "copy" and thing is not loop.optimizer:
            continue  # a shallow copy of these holds the very optimizer
        with pytest.raises(TypeError, match=r"SGD clips in its step\(\) by distclip.attach"):
            WAYS_TO_COPY[how](thing)
    back(loop.model)
    loop.step()
    assert loop.clipper.report.coef.item() < 1
    assert "__getstate__" not in loop.optimizer.state_dict()


def test_a_detached_optimizer_is_copied_again():
    loop = Loop("attach")
    loop.clipper.detach()
    twin = copy.deepcopy({"model": loop.model, "optimizer": loop.optimizer})
    clipper = distclip.attach(twin["optimizer"], twin["model"], 1.0)
    back(twin["model"])
    before = values(twin["model"])
    twin["optimizer"].step()
    assert true_norm([a - b for a, b in zip(values(twin["model"]), before, strict=True)]) == pytest.approx(1, rel=1e-5)
    clipper.verify()


def test_a_copy_of_the_model_alone_is_nobodys_business():
    loop = Loop("attach")
    average = copy.deepcopy(loop.model)
    back(average)
    back(loop.model)
    kept = whole_gradients(average.parameters())
    loop.step()
    assert same_tensors(kept, whole_gradients(average.parameters()))
    loop.clipper.verify()


def test_what_state_dict_gives_clips_a_copy_of_the_model():
    loop = Loop("step")
    model = copy.deepcopy(loop.model)
    clipper = distclip.Clipper(model, 1.0)
    clipper.load_state_dict(copy.deepcopy(loop.clipper.state_dict()))
    back(model)
    assert clipper.clip_().coef.item() < 1
    assert true_norm(whole_gradients(model.parameters())) == pytest.approx(1, rel=1e-5)
    clipper.verify()
