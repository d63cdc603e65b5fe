"""Layouts: read from metadata where it is there, said where it is not, refused where it is neither."""

from collections import Counter
from functools import partial
from itertools import product
from math import inf, prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import distclip
from distclip.layouts.layout import LayoutReader, Replication, part_of
from distclip.layouts.model import held_in
from distclip.layouts.piece import held_parameter
from distclip.plan.build import Plan
from distclip.ranks.group import ClippingGroup
from support.layouts import DenseNet
from support.oracle import true_norm
from support.parallel import (
    ep_plain,
    fsdp1_copies,
    fsdp1_experts,
    fsdp1_experts_flat,
    fsdp1_nested,
    one_rank_holds,
    tensor_parallel,
    united,
)
from support.ranks import count_collectives, run_ranks, same_bits


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


def cut_by_coordinates(mesh: DeviceMesh, placements: list, whole: torch.Tensor) -> DTensor:
    """``whole`` as a DTensor, cut without torch's scatter, which goes by ranks and not by coordinates."""
    local = whole
    for k, size, placement in zip(mesh.get_coordinate(), mesh.mesh.shape, placements, strict=True):
        local = local.chunk(size, placement.dim)[k] if placement.is_shard() else local
    return DTensor.from_local(local.clone(), mesh, placements, run_check=False)


def on_a_permuted_mesh(rows: list, placements: list, bound: float) -> tuple[float, float, float]:
    mesh = DeviceMesh("cpu", rows)
    values, whole = (torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parameter = nn.Parameter(cut_by_coordinates(mesh, placements, values))
    parameter.grad = cut_by_coordinates(mesh, placements, whole)
    clipper = distclip.Clipper(nn.ParameterList([parameter]), bound)
    clipper.verify()
    norm = clipper.clip_().norm.item()
    off = parameter.grad - cut_by_coordinates(mesh, placements, whole) * min(1.0, bound / true_norm([whole]))
    return norm, true_norm([whole]), off.to_local().abs().max().item()


@pytest.mark.parametrize("bound", [1.0, 100.0])
@pytest.mark.parametrize("placements", [[Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(0)]])
@pytest.mark.parametrize("rows", [[[0, 1], [3, 2]], [[1, 0], [2, 3]], [[3, 2], [1, 0]], [[2, 0], [1, 3]]], ids=str)
def test_a_mesh_may_list_its_ranks_in_any_order(rows, placements, bound):
    results = run_ranks(on_a_permuted_mesh, 4, rows, placements, bound)
    assert same_bits([norm for norm, _, _ in results])
    for norm, oracle, off in results:
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert off < 1e-6


def representatives(rows: torch.Tensor, placements: list) -> Counter:
    """How many of 8 ranks represent each part of a parameter; ``rows`` is a mesh of some ranks, or one row a mesh."""
    found = Counter()
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            mesh = DeviceMesh("cpu", next(mesh for mesh in rows if rank in mesh))
            tensor = cut_by_coordinates(mesh, placements, torch.ones(8, 8))  # of a Parameter torch caches rank 0's mesh
            plan = Plan.of([held_parameter(tensor)], 2.0, ClippingGroup.of(None))
            found[part_of(plan.group, plan.pieces[0])] += plan.represents[0]
        finally:
            dist.destroy_process_group()
    return found


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (2, 2, 2), (2, 4), (4, 2), (8, 1)], ids=str)
def test_one_rank_represents_the_replicas_of_each_part(shape):
    """Of one mesh of 8 ranks, or of several that hold the same, in five orders of their ranks."""
    for seed in range(5):
        rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(8)
        for placements in product([Shard(0), Replicate()], repeat=len(shape) - 1):
            found = representatives(rows.view(shape), list(placements))
            parts = prod(size for size, p in zip(shape[1:], placements, strict=True) if p.is_shard())
            assert len(found) == parts
            assert set(found.values()) == {1}


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
        ("outside the group", "outside the clipping group: pass a `group` that includes all of its ranks"),
        ("too many replicas", "LayoutError: layout says that 99 ranks hold parameter 0"),
        ("pieces that do not tile", "is cut into 8 pieces, which do not tile the 4 ranks"),
        ("an axis outside the group", "ValueError: split_over names ranks [0, 1, 2, 3], not all of which"),
        ("a mesh of two dimensions", "ValueError: split_over takes 1-D mesh slices such as mesh['pp']"),
    ],
)
def test_what_cannot_be_known_is_an_error(what, says):
    for said in run_ranks(partial(refused, what), 4):
        assert says in said


def test_a_rank_outside_the_group_is_told_so():
    said = run_ranks(partial(refused, "not in the group"), 4)
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


def inner_group_untold(layout) -> tuple[str, dict[str, int]]:
    job = layout(torch.float32, 30.0)
    job.backward()
    with count_collectives() as counts:
        try:
            return f"norm {distclip.Clipper(job.parts, inf).measure().norm.item()}", dict(counts)
        except distclip.LayoutError as error:
            return str(error), dict(counts)


@pytest.mark.parametrize("layout", [fsdp1_experts, fsdp1_experts_flat])
def test_fsdp1_experts_that_nobody_told_about_are_refused_at_construction(layout):
    """On metadata they look like copies in both groups; their values tell that they are not."""
    results = run_ranks(inner_group_untold, 4, layout)
    for said, counts in results:
        assert said.startswith("ranks that should hold copies hold different values of inner.0.weight, inner.0.bias, ")
        assert "pass layout=... (distclip.Layout.cut(parts=[tp])) where ranks hold different parts" in said
        assert said.index("layout=") < said.index("split_over=[mesh['pp']]")
        assert counts == {"allreduce": 2}


def experts_that_begin_alike(orig: bool, told: bool) -> tuple[str, float, float]:
    """Two experts of the same first values, which see other rows: only their gradients tell them apart."""
    job = fsdp1_nested(torch.float32, 30.0, orig, True)
    with FullyShardedDataParallel.summon_full_params(job.parts[0], writeback=True):
        for p in job.parameters():
            p.data.fill_(0.1)
    job.backward()
    clipper = distclip.Clipper(job.parts, inf, layout=one_rank_holds if told else None)
    norm = clipper.measure().norm.item()
    try:
        clipper.verify()
    except distclip.LayoutError as error:
        return str(error), norm, true_norm(united(job))
    return "proved", norm, true_norm(united(job))


@pytest.mark.parametrize("orig", [True, False], ids=["orig", "flat"])
def test_fsdp1_experts_that_begin_alike_are_found_by_their_gradients(orig):
    for said, norm, oracle in run_ranks(experts_that_begin_alike, 4, orig, False):
        assert said.startswith("ranks that should hold the same gradient do not: inner.")
        assert norm != pytest.approx(oracle, rel=1e-3)  # which is why verify() is there
    results = run_ranks(experts_that_begin_alike, 4, orig, True)
    assert same_bits([norm for _, norm, _ in results])
    for said, norm, oracle in results:
        assert said == "proved"
        assert norm == pytest.approx(oracle, rel=2e-7)


def a_rank_without_parameters(how: str, p: float, dtype: torch.dtype, empty: int) -> tuple:
    """One rank has nothing at all; the others one parameter each."""
    world, me = dist.group.WORLD, dist.get_rank()
    pair = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))["pp"]
    model = nn.Module() if me == empty else nn.ParameterList([torch.zeros(4, dtype=dtype)])
    gradients = [torch.randn(4, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(3)]
    whole = [gradients[rank] for rank in range(dist.get_world_size()) if rank != empty]
    oracle = true_norm(whole, p)
    for parameter in model.parameters():
        parameter.grad = gradients[me].clone()
    norms, counts = [], []
    for bound in (2 * oracle, oracle / 3, inf):
        with count_collectives() as counted:
            match how:
                case "Clipper":
                    counted.clear()
                    clipper = distclip.Clipper(model, bound, norm_type=p, split_over=[pair])
                    counted.clear()
                    norms.append(clipper.clip_().norm)
                case "Clipper without parts":
                    parts = [] if me == empty else [model]
                    clipper = distclip.Clipper(parts, bound, norm_type=p, split_over=[world])
                    counted.clear()
                    norms.append(clipper.clip_().norm)
                case "module":
                    norms.append(distclip.clip_grad_norm_(model, bound, p, split_over=[pair]))
                case "list":
                    norms.append(distclip.clip_grad_norm_(list(model.parameters()), bound, p, split_over=[pair]))
                case "list and group":
                    handed = list(model.parameters())
                    norms.append(distclip.clip_grad_norm_(handed, bound, p, group=world, split_over=[world]))
                case "layout":
                    handed, held_by = list(model.parameters()), lambda name, parameter: distclip.Layout(1)
                    norms.append(distclip.clip_grad_norm_(handed, bound, p, layout=held_by))
                case "gradients":
                    handed = [parameter.grad for parameter in model.parameters()]
                    norms.append(distclip.get_total_norm(handed, p, split_over=[pair]))
                    distclip.clip_grads_with_norm_(model.parameters(), bound, norms[-1])
        counts.append(dict(counted))
    return norms, oracle, counts


EMPTY_WAYS = ["Clipper", "Clipper without parts", "module", "list", "list and group", "layout", "gradients"]


@pytest.mark.parametrize("how", EMPTY_WAYS)
@pytest.mark.parametrize(
    ("size", "empty", "p", "dtype"),
    [(2, 0, 2.0, torch.float32), (3, 2, inf, torch.float32), (3, 1, 2.0, torch.float64)],
)
def test_a_rank_without_parameters_takes_part(how, size, empty, p, dtype):
    results = run_ranks(a_rank_without_parameters, size, how, p, dtype, empty)
    assert same_bits([norms for norms, _, _ in results])
    norms, oracle, _ = results[0]
    assert [norm.item() for norm in norms] == pytest.approx([oracle, oracle, oracle / 3], rel=2e-6)
    assert norms[0].item() == pytest.approx(oracle, rel=2e-7)
    assert {norm.dtype for norm in norms} == {dtype}
    expected = {"allreduce": 1}
    if "Clipper" in how:  # the first call of each compares along split_over: values that are one number
        expected = {"allreduce": 2, "alltoallbase": 2 * (size - 1).bit_length()}
    assert all(counts == [expected] * 3 for _, _, counts in results)


def cut_by_hand() -> tuple[list[object], torch.Tensor, float]:
    """Two rows of ranks, in each of which a weight is cut by hand and a norm layer is copied."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    rank = mesh["tp"].get_local_rank()
    net = torch.nn.ModuleDict({"weight": torch.nn.Linear(3, 2, bias=False), "norm": torch.nn.LayerNorm(3)})
    torch.nn.init.constant_(net["weight"].weight, float(rank))
    for p in net.parameters():
        p.grad = torch.full_like(p, 1.0 + rank if p.shape == (2, 3) else 5.0)
    cut = distclip.Layout.cut(parts=[mesh["tp"]])
    said: list[object] = [
        cut.replicas,
        distclip.Layout.cut(over=[]).replicas,
        distclip.Layout.cut(over=[mesh.get_group("dp")], parts=[mesh["tp"]]).replicas,
        distclip.Layout.cut(over=[], group=mesh.get_group("tp")).replicas,
    ]
    tp = mesh["tp"]
    for wrong in ({"over": [tp] * 2, "parts": [tp]}, {"parts": [mesh["dp"]], "group": mesh.get_group("tp")}):
        try:
            distclip.Layout.cut(**wrong)
        except ValueError as error:
            said.append(str(error))
    clipper = distclip.Clipper(net, torch.inf, layout=lambda name, p: cut if name.startswith("weight") else None)
    clipper.verify()
    pieces = [torch.full((2, 3), 1.0 + k) for k in range(size // 2)]
    return said, clipper.measure().norm, true_norm([*pieces, torch.full((6,), 5.0)])


@pytest.mark.parametrize("size", [2, 4])
def test_a_layout_is_said_by_the_axes_it_is_cut_over(size):
    results = run_ranks(cut_by_hand, size)
    assert same_bits([norm for _, norm, _ in results])
    for said, norm, oracle in results:
        assert norm.item() == pytest.approx(oracle, rel=2e-7)
        assert said[:4] == [2, size, 1, size // 2]
        assert any("not all of which are in the clipping group" in each for each in said[4:])
    if size == 4:
        assert "do not tile the 4 ranks of the clipping group" in results[0][0][4]


# ---- where a parameter is, of which other ranks have one of the same name ----------------------------------


def read(model: nn.Module, **options) -> dict[str, Replication]:
    group = ClippingGroup.of(options.pop("group", None))
    reader = LayoutReader(group, options.pop("split_over", ()), options.pop("layout", None))
    return {item.piece.name: reader.read(item, i) for i, item in enumerate(held_in([model]))}


def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))


def where_it_is(how: str) -> tuple[str | None, bool]:
    mesh = two_by_two()
    plain = nn.ParameterDict({"w": torch.zeros(4, 3)})
    on_dp = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh["dp"], [Shard(0)]))})
    on_all = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate(), Shard(0)]))})
    cut = distclip.Layout.cut
    match how:
        case "nothing said":
            found = read(plain)
        case "split_over":
            found = read(plain, split_over=[mesh["pp"]])
        case "split_over two axes":
            found = read(plain, split_over=[mesh["dp"], mesh["pp"]])
        case "split_over a group":
            found = read(plain, split_over=[mesh["dp"], mesh.get_group("pp")])
        case "split_over an axis of its metadata":
            found = read(on_dp, split_over=[mesh["dp"], mesh["pp"]])
        case "all axes are in its metadata":
            found = read(on_all, split_over=[mesh["pp"]])
        case "cut":
            found = read(plain, layout=lambda *_: cut(over=[mesh["pp"]]))
        case "cut over a group":
            found = read(plain, layout=lambda *_: cut(over=[mesh.get_group("pp")]))
        case "cut over an axis of its metadata":
            found = read(on_dp, layout=lambda *_: cut(over=[mesh["dp"], mesh["pp"]]))
        case "cut into parts":
            found = read(plain, layout=lambda *_: cut(parts=[mesh["pp"]]))
        case "experts in parts":
            found = read(plain, layout=lambda *_: cut(over=[mesh["pp"]], parts=[mesh["dp"]]))
        case "cut over nothing":
            found = read(plain, layout=lambda *_: cut())
        case "on every rank":
            found = read(plain, layout=lambda *_: distclip.Layout(4))
        case "on one rank":
            found = read(plain, layout=lambda *_: distclip.Layout(1))
        case "on some two ranks":
            found = read(plain, layout=lambda *_: distclip.Layout(2))
        case "on the ranks of its mesh":
            found = read(on_dp, layout=lambda *_: distclip.Layout(1))
        case "on the ranks of its mesh, replicas too":
            found = read(on_all, layout=lambda *_: distclip.Layout(2))
        case "on more than the ranks of its mesh":
            found = read(on_dp, layout=lambda *_: distclip.Layout(2))
        case "parts on one rank":
            found = read(plain, layout=lambda *_: distclip.Layout(1, parts=True))
        case "in a smaller group":
            found = read(plain, group=mesh.get_group("dp"), layout=lambda *_: distclip.Layout(1))
    return found["w"].where, found["w"].parts


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("nothing said", ["", "", "", ""]),
        ("split_over", ["pp=0", "pp=0", "pp=1", "pp=1"]),
        ("split_over two axes", ["dp=0,pp=0", "dp=1,pp=0", "dp=0,pp=1", "dp=1,pp=1"]),
        ("split_over a group", ["dp=0,axis1=0", "dp=1,axis1=0", "dp=0,axis1=1", "dp=1,axis1=1"]),
        ("split_over an axis of its metadata", ["pp=0", "pp=0", "pp=1", "pp=1"]),
        ("all axes are in its metadata", ["", "", "", ""]),
        ("cut", ["pp=0", "pp=0", "pp=1", "pp=1"]),
        ("cut over a group", ["axis0=0", "axis0=0", "axis0=1", "axis0=1"]),
        ("cut over an axis of its metadata", ["pp=0", "pp=0", "pp=1", "pp=1"]),
        ("cut into parts", ["", "", "", ""]),
        ("experts in parts", ["pp=0", "pp=0", "pp=1", "pp=1"]),
        ("cut over nothing", ["", "", "", ""]),
        ("on every rank", ["", "", "", ""]),
        ("on one rank", ["#0", "#1", "#2", "#3"]),
        ("on some two ranks", [None, None, None, None]),
        ("on the ranks of its mesh", ["#0", "#0", "#2", "#2"]),
        ("on the ranks of its mesh, replicas too", ["#0", "#0", "#0", "#0"]),
        ("on more than the ranks of its mesh", [None, None, None, None]),
        ("parts on one rank", ["", "", "", ""]),
        ("in a smaller group", ["#0", "#1", "#0", "#1"]),
    ],
)
def test_ranks_know_which_of_the_parameters_of_one_name_they_hold(how, where):
    found = run_ranks(where_it_is, 4, how)
    assert [place for place, _ in found] == where
    assert {parts for _, parts in found} == {"parts" in how}


def where_wrapped(layout) -> dict[str, str | None]:
    job = layout(torch.float32, 1.0)
    return {name: each.where for name, each in read(job.parts[0], **job.options).items()}


@pytest.mark.parametrize(
    ("layout", "dense", "inner", "places"),
    [
        (fsdp1_experts, "dense.weight", "inner.0.weight", ["#0", "#0", "#2", "#2"]),
        (fsdp1_experts_flat, "dense.weight", "inner.0.weight", ["ep=0", "ep=0", "ep=1", "ep=1"]),
        (fsdp1_copies, "dense.weight", "inner.0.weight", ["", "", "", ""]),
    ],
)
def test_ranks_know_which_experts_of_fsdp1_they_hold(layout, dense, inner, places):
    found = run_ranks(where_wrapped, 4, layout)
    assert [each[dense] for each in found] == ["", "", "", ""]
    assert [each[inner] for each in found] == places


def test_nobody_says_which_ranks_hold_an_expert_whose_replicas_are_a_number():
    for found in run_ranks(where_wrapped, 4, ep_plain):
        assert found["dense.weight"] == ""
        assert {where for name, where in found.items() if name.startswith("experts")} == {None}


def over_tensor_parallel() -> set[str | None]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    inner = tensor_parallel(DenseNet(), mesh["tp"], sequence=False)
    model = FullyShardedDataParallel(inner, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True)
    found = read(model, layout=lambda name, p: distclip.Layout(1))
    return {each.where for name, each in found.items() if name == "blocks.0.1.weight"}


def test_the_ranks_of_fsdp1_over_tensor_parallel_hold_one_parameter():
    assert run_ranks(over_tensor_parallel, 4) == [{"#0"}] * 4


def replications_are_shared() -> tuple[int, int]:
    cut = distclip.Layout.cut(over=[two_by_two()["pp"]])
    model = nn.ParameterDict({str(i): torch.zeros(2) for i in range(6)})
    kinds = {"0": cut, "1": cut, "2": distclip.Layout(2), "3": distclip.Layout(2)}
    found = read(model, layout=lambda name, p: kinds.get(name)).values()
    return len({id(each) for each in found}), len({each.where for each in found})


def test_pieces_that_lie_alike_share_one_replication():
    assert run_ranks(replications_are_shared, 4) == [(3, 3)] * 4
