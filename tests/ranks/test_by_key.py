"""Adding by key: every rank has keys of its own, and the sums are those of one process."""

import random
from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from distclip.ranks.by_key import Sum, add_by_key, asked
from distclip.ranks.group import ClippingGroup
from promises.test_accelerator import on_the_accelerator
from support.accelerator import DEVICE, EXISTS
from support.ranks import count_collectives, run_ranks
from support.simulated import SimulatedGroup, simulate

CPU = torch.device("cpu")


def numbers(size: int, seed: int) -> list[dict[int, float]]:
    """What each rank has: none, few or many keys, of which others have some too."""
    chance = random.Random(seed)
    keys = [chance.randrange(1 << 48) for _ in range(20)] + [0, 1, (1 << 48) - 1]
    shares = [0.25, 0.5, 1.0]  # whose sums are exact
    return [{k: chance.choice(shares) for k in chance.sample(keys, chance.randrange(len(keys)))} for _ in range(size)]


def by_hand(ranks: list[dict[int, float]]) -> dict[int, Sum]:
    totals = Counter()
    for mine in ranks:
        totals.update(mine)
    return {key: Sum(total, min(r for r, mine in enumerate(ranks) if key in mine)) for key, total in totals.items()}


def added(group: SimulatedGroup | ClippingGroup, seed: int, device: torch.device = CPU) -> tuple[dict, dict]:
    """The sums at home here, and those of all keys of one rank."""
    ranks = numbers(group.size, seed)
    held = add_by_key(group, device, ranks[group.rank])
    source = seed % group.size
    return held, asked(group, device, source, list(ranks[source]) if group.rank == source else [7], held)


@pytest.mark.parametrize("size", [*range(1, 10), 16, 33])
@pytest.mark.parametrize("seed", [0, 1])
def test_sums_by_key_are_those_of_one_process(size, seed):
    check(simulate(partial(added, seed=seed), size, 2 * (size - 1).bit_length() + 3), seed)


def check(ends: list[tuple[dict, dict]], seed: int) -> None:
    size = len(ends)
    ranks = numbers(size, seed)
    expected = by_hand(ranks)
    assert expected
    assert all(key % size == rank for rank, (held, _) in enumerate(ends) for key in held)
    assert {key: found for held, _ in ends for key, found in held.items()} == expected
    assert [told for _, told in ends] == [{key: expected[key].total for key in ranks[seed % size]}] * size


def on_real_ranks() -> tuple[tuple[dict, dict], dict[str, int]]:
    with count_collectives() as counts:
        return added(ClippingGroup.of(None), 5), dict(counts)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_real_ranks_add_by_key_too(size):
    ends = run_ranks(on_real_ranks, size)
    check([end for end, _ in ends], 5)
    assert all(counts == {"alltoallbase": 2 * (size - 1).bit_length(), "allreduce": 3} for _, counts in ends)


def on_a_device() -> tuple[dict, dict]:
    with on_the_accelerator():
        return added(ClippingGroup.of(None), 5, torch.device(DEVICE, 0))


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_on_accelerators_they_do():
    check(run_ranks(on_a_device, 3, fresh=True), 5)


def one_does_not_come() -> str:
    """Rank 1 has left; ranks 0 and 2 wait for it in an exchange, and some only hear that others have given up."""
    group = ClippingGroup.of(dist.new_group(timeout=timedelta(seconds=2)))
    add_by_key(group, CPU, {})
    if dist.get_rank() == 1:
        return ""
    try:
        add_by_key(group, CPU, {1: 1.0})
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_who_does_not_come_to_add_is_named():
    for rank, said in enumerate(run_ranks(one_does_not_come, 3, fresh=True)):
        assert rank == 1 or said.startswith("a collective of the clipping group failed: rank 1 did not join or died")
