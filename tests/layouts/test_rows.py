"""Rows: each element that a rank holds lies in the row of the whole parameter that its piece says."""

from collections import Counter
from functools import partial
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import distclip
from distclip.kernels.each import row_sums
from distclip.layouts.model import held_in
from distclip.layouts.piece import Held, held_parameter
from distclip.layouts.rows import Rows, rows_of
from support.older_torch import cut
from support.ranks import run_ranks
from support.samples import crossed

Found = tuple[str, tuple[int, ...], int, list[tuple[int, int]]]
"""Name, global shape, total, and the row and value of each element of one piece."""


def numbered(*shape: int) -> Tensor:
    """Each element is its place in the whole."""
    return torch.arange(prod(shape), dtype=torch.float32).view(shape)


class Net(nn.Module):
    """Matrices, vectors, a convolution and a scalar, of sizes that few numbers of ranks divide."""

    def __init__(self, hidden: int = 7, inner: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inner, hidden), nn.Linear(hidden, 5)
        self.convolution = nn.Conv1d(2, 3, 2)
        self.scale = nn.Parameter(torch.zeros(1))
        for p in self.parameters():
            p.data = numbered(*p.shape)


def row_of(place: int, shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """The row of the element at this place of the whole, without distclip."""
    indices, row = [], 0
    for size in reversed(shape):
        indices.insert(0, place % size)
        place //= size
    for dim in dims if len(shape) > 1 else ():
        row = row * shape[dim] + indices[dim]
    return row


def cut_into(rows: Rows, elements: int) -> list[int]:
    """The row of each element, as `Cut` describes it."""
    head, length, tail, count = rows.cut
    whole, left = divmod(elements - head - tail, max(length, 1))
    sizes = ([head] if head else []) + [length] * whole + ([tail] if tail else [])
    assert (left, len(sizes), rows.index.shape) == (0, count, (count,))
    return [row for row, size in zip(rows.index.tolist(), sizes, strict=True) for _ in range(size)]


def looked_at(listed: list[Held], dims: tuple[int, ...] | None = None) -> list[Found]:
    found = []
    for item in listed:
        rows, first = rows_of(item.piece, dims), item.values().detach()
        if first.ndim > 1:  # a view, as sums and scaling take it
            first = first.movedim(rows.dims, tuple(range(len(rows.dims))))
        values = first.flatten().tolist()
        assert rows.index.dtype == torch.int64
        assert rows.index.unique().tolist() == rows.index.tolist()
        pairs = list(zip(cut_into(rows, len(values)), map(int, values), strict=True))
        for p, power in ((2.0, 2), (1.0, 1)):
            sums = [sum(value**power for at, value in pairs if at == row) for row in rows.index.tolist()]
            assert row_sums([first], [rows.cut], p).tolist() == sums
        found.append((item.piece.name, tuple(item.piece.global_shape), prod(size for _, size in rows.grid), pairs))
    return found


def check(results: list[list[Found]], copies: int | None = None, dims: tuple[int, ...] = (0,)) -> None:
    """Every element of every rank is in its row; together the ranks hold all of them, ``copies`` times."""
    held: dict[str, Counter[int]] = {}
    for found in results:
        for name, shape, total, pairs in found:
            assert total == (prod(shape[dim] for dim in dims) if len(shape) > 1 else 1)
            assert [row for row, _ in pairs] == [row_of(value, shape, dims) for _, value in pairs], name
            held.setdefault(name, Counter(range(prod(shape)))).update(value for _, value in pairs)
            assert set(held[name]) == set(range(prod(shape))), name
    for name, values in held.items():
        times = {number - 1 for value, number in values.items() if value} or {values[0] - 1}
        assert 0 not in times, name
        assert copies is None or times == {copies}, name


def refusal(piece, dims: tuple[int, ...] | None = None) -> str:
    try:
        return str(rows_of(piece, dims))
    except distclip.LayoutError as error:
        return str(error)


# ---- DTensors by hand --------------------------------------------------------------------------------------


def placed(shape: tuple[int, ...], placements: list, wholes: list[tuple[int, ...]], order: list | None = None) -> list:
    mesh = DeviceMesh("cpu", torch.tensor(order or list(range(dist.get_world_size()))).view(shape))
    made = [cut(numbered(*whole), mesh, placements) for whole in wholes]
    return looked_at([held_parameter(p, str(whole)) for p, whole in zip(made, wholes, strict=True)])


MATRICES = [(7, 5), (1, 4), (8, 4), (9, 2, 3), (5, 3), (2, 9)]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "placements", [[Shard(0)], [Shard(1)], [Shard(-1)], [Replicate()], [_StridedShard(0, split_factor=2)]], ids=str
)
def test_rows_of_a_dtensor(size, placements):
    check(run_ranks(placed, size, (size,), placements, MATRICES), size if placements == [Replicate()] else 1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3]], ids=str)
@pytest.mark.parametrize(
    ("placements", "copies"),
    [
        ([Shard(0), Shard(0)], 1),
        ([Shard(0), Shard(1)], 1),
        ([Shard(1), Shard(0)], 1),
        ([Shard(1), Shard(1)], 1),
        ([Replicate(), Shard(0)], 2),
        ([Shard(0), Replicate()], 2),
        ([_StridedShard(0, split_factor=2), Shard(0)], 1),
    ],
    ids=str,
)
def test_rows_of_a_dtensor_on_two_axes(placements, copies, order):
    check(run_ranks(placed, 4, (2, 2), placements, MATRICES, order), copies)


@pytest.mark.parametrize("shape", [(3,), (1,), (0,), ()], ids=str)
def test_a_vector_and_a_number_are_one_row(shape):
    for found in run_ranks(placed, 2, (2,), [Shard(0) if shape else Replicate()], [shape]):
        ((_, _, total, pairs),) = found
        assert total == 1
        assert {row for row, _ in pairs} <= {0}


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)], ids=str)
def test_a_parameter_without_elements_has_no_rows_here(shape):
    for found in run_ranks(placed, 2, (2,), [Shard(0)], [shape]):
        assert found == [(str(shape), shape, shape[0], [])]


def on_a_permuted_mesh(placements: list) -> list:
    mesh = DeviceMesh("cpu", [[0, 1], [3, 2]])
    item = held_parameter(nn.Parameter(distribute_tensor(numbered(8, 4), mesh, placements)), "weight")
    return refusal(item.piece) if "ascending" in refusal(item.piece) else looked_at([item])


@pytest.mark.parametrize(
    "placements", [[Shard(0), Replicate()], [Shard(0), Shard(1)], [Replicate(), Shard(1)]], ids=str
)
def test_rows_along_an_axis_in_ascending_order_are_known_on_a_permuted_mesh(placements):
    check(run_ranks(on_a_permuted_mesh, 4, placements))


@pytest.mark.parametrize("placements", [[Replicate(), Shard(0)], [Shard(0), Shard(0)], [Shard(1), Shard(0)]], ids=str)
def test_rows_along_an_axis_in_another_order_are_refused(placements):
    """torch scatters them by rank, and reads them by coordinate."""
    said = run_ranks(on_a_permuted_mesh, 4, placements)
    assert all(each.startswith("weight is cut into rows along a mesh axis whose ranks are not in asc") for each in said)


def cut_otherwise() -> tuple[int, str]:
    mesh = init_device_mesh("cpu", (2,))
    local = numbered(3 if dist.get_rank() == 0 else 1, 2)
    made = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size([4, 2]), stride=(2, 1))
    return refusal(held_parameter(made, "weight").piece)


def test_a_dtensor_that_is_not_cut_as_its_placements_say_is_refused():
    assert all("another number of elements of weight than its placements say" in s for s in run_ranks(cut_otherwise, 2))


# ---- rows along other dims ---------------------------------------------------------------------------------


CUBES = [(4, 3, 5), (1, 6, 2), (7, 2, 3), (5, 8, 4)]
DIMS = [(), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def placed_along(shape: tuple[int, ...], placements: list, dims: tuple[int, ...]) -> list[Found]:
    mesh = init_device_mesh("cpu", shape)
    made = [distribute_tensor(numbered(*whole), mesh, placements) for whole in CUBES]
    return looked_at([held_parameter(p, str(whole)) for p, whole in zip(made, CUBES, strict=True)], dims)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(
    ("placements", "size"), [([Replicate()], 1), ([Shard(0)], 2), ([Shard(1)], 3), ([Shard(2)], 4)], ids=str
)
def test_rows_along_any_dims_of_a_dtensor(placements, size, dims):
    check(run_ranks(placed_along, size, (size,), placements, dims), 1, dims)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(
    "placements", [[Shard(0), Shard(1)], [Shard(2), Shard(1)], [Shard(1), Shard(1)], [Shard(2), Shard(0)]], ids=str
)
def test_rows_along_any_dims_of_a_dtensor_on_two_axes(placements, dims):
    check(run_ranks(placed_along, 4, (2, 2), placements, dims), 1, dims)


def matrices_along(size: tuple[int, ...], hidden: int) -> list[Found]:
    """Tensor parallel inside FSDP2, whose rows are the inputs of a layer."""
    mesh = init_device_mesh("cpu", size, mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Net(hidden), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return looked_at(held_in([model]), (1,))


@pytest.mark.parametrize("hidden", [7, 8])
@pytest.mark.parametrize("size", [(2, 2), (3, 2)], ids=str)
def test_rows_along_dim_1_of_tensor_parallel_inside_fsdp2(size, hidden):
    check(run_ranks(matrices_along, prod(size), size, hidden), None, (1,))


class Outputs(nn.Module):
    """Layers whose outputs are along other dims, parametrized ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.along = nn.ConvTranspose1d(3, 4, 2), nn.Conv1d(3, 4, 2)
        self.embed, self.bilinear = nn.Embedding(7, 3), nn.Bilinear(2, 3, 4)
        self.experts = nn.ParameterDict({"w": nn.Parameter(torch.zeros(4, 3, 5)), "b": nn.Parameter(torch.zeros(4, 3))})
        self.images = nn.ConvTranspose2d(2, 3, 2)
        self.normed = weight_norm(nn.Conv1d(3, 4, 2))
        for p in self.parameters():
            p.data = numbered(*p.shape)


OUTPUTS = {
    "up.weight": (1,),
    "images.weight": (1,),
    "experts.w": (0, 1),
    **dict.fromkeys(["along.weight", "embed.weight", "bilinear.weight", "experts.b"], (0,)),
    **dict.fromkeys([f"normed.parametrizations.weight.original{k}" for k in (0, 1)], (0,)),
}


def dims_in(how: str) -> dict[str, tuple[int, ...]]:
    model: nn.Module = Outputs()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp2":
        fully_shard(model)
    elif how.startswith("fsdp1"):
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=how == "fsdp1")
    elif how == "list":
        model = nn.ParameterList(model.parameters())
    return {item.piece.name: item.piece.row_dims for item in held_in([model]) if len(item.piece.global_shape) > 1}


@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp2", "fsdp1", "fsdp1 flat"])
def test_rows_are_outputs_by_the_kind_of_their_layer(how):
    for found in run_ranks(dims_in, 1 if how == "plain" else 2, how):
        assert found == OUTPUTS


def test_of_bare_parameters_those_of_three_dimensions_are_experts():
    assert set(dims_in("list").values()) == {(0,), (0, 1)}


def flat_along(dims: tuple[int, ...], orig: bool) -> list[Found] | str:
    model = nn.ParameterList(nn.Parameter(numbered(*whole)) for whole in CUBES)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=orig)
    try:
        return looked_at(held_in([wrapped]), dims)
    except distclip.LayoutError as error:
        return str(error)


@pytest.mark.parametrize("orig", [True, False], ids=["orig", "flat"])
@pytest.mark.parametrize("dims", [(), (0,), (0, 1), (0, 1, 2)], ids=str)
def test_rows_along_first_dims_that_fsdp1_cuts_in_the_middle(dims, orig):
    check(run_ranks(flat_along, 3, dims, orig), 1, dims)


@pytest.mark.parametrize("dims", [(1,), (0, 2)], ids=str)
def test_rows_along_other_dims_under_fsdp1_are_refused(dims):
    for said in run_ranks(flat_along, 2, dims, True):
        assert f"has flattened 0 row by row, and its rows are along dims {dims}, of which a rank has no view" in said
        assert "pass dims={'0': (0,)}" in said


# ---- wrappers ----------------------------------------------------------------------------------------------


def wrapped(how: str) -> list[Found]:
    size, model = dist.get_world_size(), Net()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp2 on dim 1":
        for p in model.parameters():
            p.data = numbered(*([2 * size] * max(p.ndim, 1)))
        fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    else:
        model = fully_shard(model) if how == "fsdp2" else model
    return looked_at(held_in([model]))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp2", "fsdp2 on dim 1"])
def test_rows_of_a_model(size, how):
    check(run_ranks(wrapped, size, how), 1 if "fsdp2" in how else size)


def parallel(how: str, dims: tuple[int, ...], hidden: int, inner: int = 6) -> list[Found]:
    """Tensor parallel of ``dims[-1]`` ranks, inside data parallel of the others."""
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicate", "dp", "tp")[-len(dims) :])
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Net(hidden, inner), mesh["tp"], plan)
    cpu = torch.device("cpu")
    match how:
        case "fsdp2":
            fully_shard(model, mesh=mesh["replicate", "dp"] if len(dims) == 3 else mesh["dp"])
        case "fsdp1" | "fsdp1 flat":
            model = FullyShardedDataParallel(
                model, device_mesh=mesh["dp"], device_id=cpu, use_orig_params=how == "fsdp1"
            )
        case "ddp":
            model = DistributedDataParallel(model, device_mesh=mesh["dp"])
    return looked_at(held_in([model]))


@pytest.mark.parametrize("hidden", [4, 5, 7, 8, 10])
@pytest.mark.parametrize("how", ["tp", "fsdp2", "fsdp1", "fsdp1 flat", "ddp"])
def test_rows_of_tensor_parallel_inside_data_parallel(how, hidden):
    check(run_ranks(parallel, 4, how, (2, 2), hidden))


MESHES = [(3, 2), (2, 3), (2, 4), (4, 2), (2, 2, 2)]


@pytest.mark.parametrize(("dims", "hidden"), crossed([(dims,) for dims in MESHES], [7, 9]))
def test_rows_of_uneven_tensor_parallel_that_fsdp2_cuts_once_more(dims, hidden):
    """Where ``_StridedShard``, read as torch reads it, gives other ranks an element (7 rows on 3 x 2, 9 on 4 x 2)."""
    check(run_ranks(parallel, prod(dims), "fsdp2", dims, hidden))


def without_its_module() -> tuple[list[int], str]:
    """FSDP2 over tensor parallel, 7 rows on 3 x 2, of which nothing tells that FSDP2 made it."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Net(7), mesh["tp"], {"up": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return mesh.get_coordinate(), refusal(held_parameter(model.up.weight, "up.weight").piece)


def test_what_torch_and_fsdp2_cut_in_two_ways_is_refused_without_the_module():
    said = {tuple(coordinate): said for coordinate, said in run_ranks(without_its_module, 6)}
    assert "up.weight is cut unevenly by a _StridedShard" in said[2, 0]
    assert "Rows(" in said[0, 0]


def flat(strategy: str, orig: bool, size: int, shard: int | None = None) -> list[Found]:
    mesh = init_device_mesh("cpu", (size // 2, 2) if strategy.startswith(("HYBRID", "_HYBRID")) else (size,))
    torch.manual_seed(0)
    inner = nn.Sequential(Net(), Net(hidden=3))
    inner[1] = FullyShardedDataParallel(inner[1], **_options(strategy, orig, mesh))
    return looked_at(held_in([FullyShardedDataParallel(inner, **_options(strategy, orig, mesh))]))


def _options(strategy: str, orig: bool, mesh: DeviceMesh) -> dict:
    return {
        "sharding_strategy": ShardingStrategy[strategy],
        "use_orig_params": orig,
        "device_mesh": mesh,
        "device_id": torch.device("cpu"),
    }


@pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning")
@pytest.mark.parametrize("orig", [True, False], ids=["orig", "flat"])
@pytest.mark.parametrize(
    ("strategy", "size", "copies"),
    [
        ("FULL_SHARD", 2, 1),
        ("FULL_SHARD", 3, 1),
        ("FULL_SHARD", 4, 1),
        ("SHARD_GRAD_OP", 3, 1),
        ("NO_SHARD", 2, 2),
        ("HYBRID_SHARD", 4, 2),
    ],
)
def test_rows_that_fsdp1_cuts_in_the_middle(strategy, size, copies, orig):
    results = run_ranks(flat, size, strategy, orig, size)
    check(results, copies)
    if strategy == "FULL_SHARD":
        parts = Counter(
            (name, row) for found in results for name, _, _, pairs in found for row in {r for r, _ in pairs}
        )
        assert max(parts.values()) > 1, "some row is on two ranks"


def transposed(channels_last: bool) -> str | list[Found]:
    model = nn.Conv2d(2, 6, 3) if channels_last else nn.Linear(4, 6)
    weight = numbered(*model.weight.shape)
    model.weight = nn.Parameter(
        weight.to(memory_format=torch.channels_last) if channels_last else weight.t().contiguous().t()
    )
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    (item,) = (item for item in held_in([wrapped]) if item.piece.name == "weight")
    if not channels_last:
        return refusal(item.piece)
    assert "in another order than row by row" in refusal(item.piece, (0, 1))
    rows = rows_of(item.piece)
    return [
        (
            "weight",
            tuple(item.piece.global_shape),
            prod(size for _, size in rows.grid),
            [
                (row, int(value))
                for row, value in zip(cut_into(rows, item.piece.here), item.values().tolist(), strict=True)
            ],
        )
    ]


def test_a_matrix_that_fsdp1_flattened_by_columns_is_refused():
    assert all(
        "has flattened weight in another order than row by row" in s for s in run_ranks(partial(transposed, False), 2)
    )


def test_rows_of_a_channels_last_convolution_are_known_under_fsdp1():
    check(run_ranks(partial(transposed, True), 2), 1)
