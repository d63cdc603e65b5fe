"""Meshes whose ranks stand in any order: which part a rank holds, how many hold it, and who of them represents it."""

import random
from collections import Counter, defaultdict
from math import prod

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from distclip.layouts.layout import LayoutReader, part_of
from distclip.layouts.model import held_in
from distclip.ranks.group import ClippingGroup
from fuzz.exact_layouts import fake
from support.older_torch import cut

SHAPES = {1: [(8,)], 2: [(2, 4), (4, 2)], 3: [(2, 2, 2)]}


def drawn(chance: random.Random) -> tuple[torch.Tensor, list[int], list[Shard | Replicate]]:
    """Eight ranks in any order as a mesh, of which axes a slice is taken, and how these cut a tensor."""
    grid = torch.tensor(chance.sample(range(8), 8)).view(chance.choice(SHAPES[chance.randint(1, 3)]))
    taken = sorted(chance.sample(range(grid.ndim), chance.randint(1, grid.ndim)))
    placements = [chance.choice([Shard(0), Shard(1), Replicate()]) for _ in taken]
    return grid, taken, placements


def held_by(rank: int, grid: torch.Tensor, taken: list[int], placements) -> tuple[object, ...]:
    """What a rank holds of one parameter, and what is read of that."""
    with fake(rank, 8):
        names = tuple(f"{axis} of rank {rank}" for axis in "abc"[: grid.ndim])  # torch takes equal meshes for one
        mesh = DeviceMesh("cpu", grid, mesh_dim_names=names)[tuple(names[axis] for axis in taken)]
        whole = torch.arange(16 * 8).view(16, 8).float()
        local = cut(whole, mesh, placements)
        group = ClippingGroup.of(None)
        (held,) = held_in([torch.nn.ParameterList([torch.nn.Parameter(local)])])
        found = LayoutReader(group, (), None).read(held, 0)
        content = tuple(local.to_local().flatten().tolist())
        return content, found.replicas, found.represents, part_of(group, held.piece)


@pytest.mark.parametrize("seed", range(24))
def test_replicas_are_counted_and_one_of_them_represents_them(seed):
    ranks = [held_by(rank, *drawn(random.Random(seed))) for rank in range(8)]
    holders = Counter(content for content, *_ in ranks)
    assert [replicas for _, replicas, *_ in ranks] == [holders[content] for content, *_ in ranks]
    assert Counter(content for content, _, represents, _ in ranks if represents) == dict.fromkeys(holders, 1)
    contents_of = defaultdict(set)
    for content, _, _, part in ranks:
        contents_of[part].add(content)
    assert all(len(contents) == 1 for contents in contents_of.values())
    assert len(contents_of) == len(holders)
    assert sum(map(len, holders)) == prod((16, 8))
