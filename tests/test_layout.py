"""Layouts: read from metadata where it is there, said where it is not, refused where it is neither."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distclip
from oracle import true_norm
from ranks import count_collectives, run_ranks, same_bits


def placed(shape: tuple[int, ...], names: tuple[str, ...], placements: list) -> tuple[float, float]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    torch.manual_seed(0)
    whole = torch.randn(7, 5)
    parameter = nn.Parameter(distribute_tensor(torch.zeros(7, 5), mesh, placements))
    parameter.grad = distribute_tensor(whole, mesh, placements)
    with count_collectives() as counts:
        norm = distclip.clip_grad_norm_([parameter], torch.inf)
    assert counts == {"allreduce": 1}
    return norm.item(), true_norm([whole])


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((4,), [Shard(0)]),
        ((4,), [Shard(1)]),
        ((4,), [Replicate()]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 2), [Shard(0), Replicate()]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Replicate()]),
    ],
    ids=str,
)
def test_every_element_of_a_dtensor_counts_once(shape, placements):
    results = run_ranks(placed, 4, shape, ("a", "b")[: len(shape)], placements)
    assert same_bits([norm for norm, _ in results])
    assert results[0][0] == pytest.approx(results[0][1], rel=2e-7)


def stages(how: str) -> tuple[float, float] | str:
    """Two pipeline stages of two replicas each, held as plain tensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    torch.manual_seed(0)
    gradients = [torch.randn(4, 3), torch.randn(4, 3)]
    model = nn.ParameterDict({f"stage{stage}": nn.Parameter(torch.zeros(4, 3))})
    model[f"stage{stage}"].grad = gradients[stage].clone()
    oracle = true_norm(gradients)
    try:
        match how:
            case "split_over a mesh axis":
                norm = distclip.clip_grad_norm_(model, torch.inf, split_over=[mesh["pp"]])
            case "split_over a group":
                norm = distclip.Clipper(model, torch.inf, split_over=[mesh.get_group("pp")]).measure().norm
            case "layout":
                norm = distclip.Clipper(model, torch.inf, layout=lambda name, p: distclip.Layout(2)).measure().norm
            case "nothing":
                norm = distclip.Clipper(model, torch.inf).measure().norm
            case "a smaller group":
                pair = mesh.get_group("pp")
                norm = distclip.clip_grad_norm_(model, torch.inf, group=pair, split_over=[pair])
    except distclip.LayoutError as error:
        return str(error)
    return norm.item(), oracle


@pytest.mark.parametrize("how", ["split_over a mesh axis", "split_over a group", "layout", "a smaller group"])
def test_what_metadata_does_not_show_can_be_said(how):
    results = run_ranks(stages, 4, how)
    assert same_bits([norm for norm, _ in results])
    assert results[0][0] == pytest.approx(results[0][1], rel=2e-7)


def test_stages_that_nobody_told_about_are_refused():
    for said in run_ranks(stages, 4, "nothing"):
        assert "say which ranks hold different ones by split_over=" in said


def refused(what: str) -> str:
    world = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    cut = nn.Parameter(distribute_tensor(torch.ones(4, 4), world, [Shard(0)]))
    part = dist.new_group([0, 1])
    pair = dist.new_group([dist.get_rank() // 2 * 2, dist.get_rank() // 2 * 2 + 1], use_local_synchronization=True)
    try:
        match what:
            case "FSDP1 parameters":
                distclip.clip_grad_norm_(fsdp1().parameters(), 1.0)
            case "outside the group":
                distclip.clip_grad_norm_([cut], 1.0, group=pair)
            case "not in the group":
                distclip.clip_grad_norm_([cut], 1.0, group=part if dist.get_rank() > 1 else pair)
            case "too many replicas":
                distclip.clip_grad_norm_([cut], 1.0, layout=lambda name, p: distclip.Layout(99))
            case "pieces that do not tile":
                distclip.clip_grad_norm_([torch.ones(1)], 1.0, split_over=[world["dp"], pair])
            case "an axis outside the group":
                distclip.clip_grad_norm_([torch.ones(1)], 1.0, group=pair, split_over=[world["dp"]])
            case "a mesh of two dimensions":
                mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
                distclip.clip_grad_norm_([torch.ones(1)], 1.0, split_over=[mesh])
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fsdp1() -> nn.Module:
    torch.manual_seed(0)
    return FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            "FSDP1 parameters",
            "is managed by FSDP1 (FullyShardedDataParallel) and does not show of what it is a part: pass the FSDP1",
        ),
        ("outside the group", "outside the clipping group: pass a `group` that holds all of it"),
        ("too many replicas", "LayoutError: layout says that 99 ranks hold parameter 0"),
        ("pieces that do not tile", "is cut into 8 pieces, which do not tile the 4 ranks"),
        ("an axis outside the group", "ValueError: split_over names ranks [0, 1, 2, 3], not all of which"),
        ("a mesh of two dimensions", "ValueError: split_over takes 1-D mesh slices such as mesh['pp']"),
    ],
)
def test_what_cannot_be_known_is_an_error(what, says):
    for said in run_ranks(partial(refused, what), 4, timeout=30):
        assert says in said


def test_a_rank_outside_the_group_is_told_so():
    said = run_ranks(partial(refused, "not in the group"), 4, timeout=30)
    assert all("is not in the clipping group: only the ranks of `group` may call" in s for s in said[2:])


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_replicas_are_a_positive_whole_number(value):
    with pytest.raises(ValueError, match="replicas must be a positive whole number"):
        distclip.Layout(value)


def listed_twice(flat: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    inner = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=not flat)
    model = FullyShardedDataParallel(nn.Sequential(inner), device_id=torch.device("cpu"), use_orig_params=not flat)
    model(torch.ones(2, 4)).square().sum().backward()
    once = distclip.clip_grad_norm_(model, torch.inf)
    twice = distclip.clip_grad_norm_([model, inner, model], torch.inf)
    return once.item(), twice.item()


@pytest.mark.parametrize("flat", [False, True])
def test_an_fsdp1_module_listed_twice_counts_once(flat):
    for once, twice in run_ranks(listed_twice, 2, flat):
        assert once == twice > 0
