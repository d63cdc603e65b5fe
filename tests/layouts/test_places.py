"""Places: each element that a rank holds is where its piece says, so that fingerprints are the same in any layout."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from distclip.kernels.fingerprint import fingerprints, order_of, seed_of, whole
from distclip.layouts.model import held_in
from distclip.layouts.piece import Held, held_parameter
from distclip.layouts.places import place_of
from layouts.test_rows import MATRICES, Net, numbered
from support.older_torch import cut
from support.ranks import run_ranks

ALL = (1 << 64) - 1
Numbers = dict[str, tuple[tuple[int, ...], int]]
"""By name: the shape of the whole parameter, and the fingerprint of this rank's part."""


def numbers(listed: list[Held]) -> Numbers:
    """The fingerprints of the pieces; each element, its place in the whole, is where `place_of` says."""
    found = {}
    for item in listed:
        values = item.values().detach()
        place = place_of(item.piece, None if item.piece.flattened is not None else order_of(values))
        flat = values.permute(order_of(values)).flatten()
        runs = place.starts.view(-1, 1) + torch.arange(place.length) * place.step
        assert runs.flatten()[place.skip :][: len(flat)].tolist() == flat.tolist(), item.piece.name
        (number,) = fingerprints([values], [place], [seed_of(item.piece.name)]).tolist()
        found[item.piece.name] = tuple(item.piece.global_shape), number
    return found


def check(results: list[Numbers], copies: int | dict[str, int] = 1) -> None:
    """The numbers of all ranks add up to ``copies`` of that of the whole parameter."""
    for name, (shape, _) in results[0].items():
        (right,) = fingerprints([numbered(*shape)], [whole(prod(shape))], [seed_of(name)]).tolist()
        times = copies if isinstance(copies, int) else copies[name]
        assert (sum(found[name][1] for found in results) - times * right) & ALL == 0, name


def placed(shape: tuple[int, ...], placements: list, wholes: list[tuple[int, ...]]) -> Numbers:
    mesh = init_device_mesh("cpu", shape)
    made = [cut(numbered(*size), mesh, placements) for size in wholes]
    return numbers([held_parameter(p, str(size)) for p, size in zip(made, wholes, strict=True)])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "placements", [[Shard(0)], [Shard(1)], [Shard(-1)], [Replicate()], [_StridedShard(0, split_factor=2)]], ids=str
)
def test_places_of_a_dtensor(size, placements):
    vectors = [(7,), (16,)] if placements[0].is_replicate() or placements[0].dim == 0 else []
    wholes = [*MATRICES, *vectors]
    check(run_ranks(placed, size, (size,), placements, wholes), size if placements == [Replicate()] else 1)


@pytest.mark.parametrize(
    ("placements", "copies"),
    [
        ([Shard(0), Shard(0)], 1),
        ([Shard(0), Shard(1)], 1),
        ([Shard(1), Shard(0)], 1),
        ([Shard(1), Shard(1)], 1),
        ([Replicate(), Shard(1)], 2),
        ([_StridedShard(0, split_factor=2), Shard(0)], 1),
    ],
    ids=str,
)
def test_places_of_a_dtensor_on_two_axes(placements, copies):
    check(run_ranks(placed, 4, (2, 2), placements, MATRICES), copies)


def test_places_of_cubes_cut_along_the_last_dim():
    check(run_ranks(placed, 4, (2, 2), [Shard(2), Shard(1)], [(4, 3, 5), (7, 2, 3), (2, 8, 4)]))


def wrapped(how: str) -> Numbers:
    model = Net()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp2":
        model = fully_shard(model)
    elif how.startswith("fsdp1"):
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=how == "fsdp1")
    return numbers(held_in([model]))


@pytest.mark.parametrize(
    ("how", "size"),
    [("plain", 1), ("ddp", 2), *((how, size) for how in ("fsdp2", "fsdp1", "fsdp1 flat") for size in (2, 3))],
)
def test_the_same_numbers_whatever_wraps_a_model(how, size):
    check(run_ranks(wrapped, size, how), size if how in ("plain", "ddp") else 1)


def parallel(how: str, hidden: int) -> Numbers:
    """Tensor parallel of two ranks, inside data parallel of two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Net(hidden), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if how == "fsdp2":
        fully_shard(model, mesh=mesh["dp"])
    elif how.startswith("fsdp1"):
        model = FullyShardedDataParallel(
            model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=how == "fsdp1"
        )
    else:
        model = DistributedDataParallel(model, device_mesh=mesh["dp"])
    return numbers(held_in([model]))


@pytest.mark.parametrize("hidden", [7, 8])
@pytest.mark.parametrize("how", ["fsdp2", "fsdp1", "fsdp1 flat", "ddp"])
def test_the_same_numbers_under_tensor_parallel(how, hidden):
    results = run_ranks(parallel, 4, how, hidden)
    cut_by_tp = {"up.weight", "up.bias", "down.weight"}
    outside = 2 if how == "ddp" else 1
    check(results, {name: outside if name in cut_by_tp else 2 * outside for name in results[0]})


def in_other_orders(how: str) -> Numbers:
    """A transposed matrix and a channels-last convolution, whose memory counts in another order."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 6, 3))
    model[0].weight = nn.Parameter(numbered(6, 4).t().contiguous().t())
    model[1].weight = nn.Parameter(numbered(6, 2, 3, 3).to(memory_format=torch.channels_last))
    for layer in model:
        layer.bias.data = numbered(6)
    if how == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return numbers(held_in([model]))


@pytest.mark.parametrize("how", ["plain", "fsdp1"])
def test_the_same_numbers_in_any_order_of_memory(how):
    check(run_ranks(in_other_orders, 2, how), 2 if how == "plain" else 1)


def of_few_rows() -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = [distribute_tensor(numbered(*size), mesh, [Shard(0)]) for size in [(1, 4), (0, 3), (3, 0)]]
    return [number for item in map(held_parameter, made) for _, number in numbers([item]).values()]


def test_a_rank_without_elements_adds_nothing():
    first, second = run_ranks(of_few_rows, 2)
    assert first[0] != 0
    assert [*first[1:], *second] == [0] * 5
