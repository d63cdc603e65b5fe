"""A vector travels in place of the one number: each slot for itself, in the same message."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, inf, isnan, nan
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distclip.plan.disagreement import tell_others
from distclip.ranks.compare import who_differs
from distclip.ranks.group import ClippingGroup
from distclip.ranks.message import CODES, combined, reduce_norm
from support.accelerator import DEVICE, EXISTS, all_reduce, counted_launches, no_waits, use_accelerator
from support.ranks import run_ranks, same_bits
from support.simulated import SimulatedGroup, simulate

CPU = torch.device("cpu")
FIRST, SECOND = (0.25, 0.0, 3.0, 7.0, 1e-300), (1.0, 0.0, 0.1, 0.0, 2.0)
VECTORS = (FIRST, SECOND, (0.3, 0.0, 1e20, 5.0, 0.0), (0.0, 0.0, 9.0, 1.0, 1.0))
SLOTS = 3  # of gradients; the other two numbers of each vector only travel along
POWERS = pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, inf])
BOTH = pytest.mark.parametrize("p", [2.0, inf])


@dataclass(frozen=True)
class Found:
    """What one rank gets: norm, disagreement and flags, the vector, and its own part of the norm."""

    norm: float
    disagree: bool
    flags: list[bool]
    sums: Tensor
    own: float | None


def vector(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def together(vectors: Sequence[Sequence[float]], p: float) -> Tensor:
    """The vector of all ranks, by one process."""
    return vector(vectors).amax(0) if p == inf else vector(vectors).sum(0)


def norm_of(sums: Tensor, p: float) -> float:
    return sums[:SLOTS].max().item() if p == inf else sums[:SLOTS].sum().item() ** (1 / p)


def reduced(
    group: ClippingGroup | SimulatedGroup, own: Tensor, p: float, code: int = 7, faulty: bool = False, **more: Any
) -> Found:
    """With two flags, of which the last rank sets the first."""
    sent = own.clone()
    found = reduce_norm(group, own, p, code, faulty, [group.rank == group.size - 1, False], slots=SLOTS, **more)
    assert same_bits([sent, own]), "the vector that was given is reduced in place"
    return Found(*found.read(), found.sums, found.own)


def on_ranks(vectors: Sequence[Sequence[float]], p: float, **more: Any) -> list[Found]:
    return simulate(lambda group: reduced(group, vector(vectors[group.rank]), p, **more), len(vectors), collectives=1)


@POWERS
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_slot_is_reduced_for_itself_and_the_first_make_the_norm(size, p):
    found, expected = on_ranks(VECTORS[:size], p), together(VECTORS[:size], p)
    assert same_bits([one.norm for one in found])
    assert same_bits([one.sums for one in found])
    for one in found:
        assert one.sums.dtype == torch.float64
        assert torch.allclose(one.sums, expected, rtol=1e-15, atol=0)
        assert one.norm == pytest.approx(norm_of(expected, p), rel=1e-14)
        assert (one.disagree, one.flags, one.own) == (False, [True, False], None)


@BOTH
@pytest.mark.parametrize("flags", [0, 2])
def test_a_vector_travels_in_one_message_with_the_code_and_the_flags(flags, p):
    def use(group: SimulatedGroup) -> tuple[int, torch.dtype]:
        reduce_norm(group, vector(FIRST), p, 7, False, [False] * flags, slots=SLOTS)
        (message,) = group.backend.past
        got = message.got[group.rank]
        return got.numel(), got.dtype

    expected = (len(FIRST) + 2 + flags, torch.int64) if p == inf else (len(FIRST) + 1 + flags, torch.float64)
    assert simulate(use, 3, collectives=1) == [expected] * 3


@POWERS
@pytest.mark.parametrize("bad", [nan, copysign(nan, -1), inf])
@pytest.mark.parametrize("slot", range(len(FIRST)))
def test_what_is_not_finite_stays_in_its_slot(slot, bad, p):
    for rank in range(3):
        vectors = [list(numbers) for numbers in VECTORS[:3]]
        vectors[rank][slot] = bad
        for one in on_ranks(vectors, p):
            assert [k for k, number in enumerate(one.sums.tolist()) if not number < inf] == [slot]
            shown = one.norm if slot < SLOTS else one.sums[slot].item()
            assert isnan(shown) if isnan(bad) else shown == inf
            assert slot < SLOTS or one.norm < inf


@POWERS
def test_nan_beside_inf_is_nan_in_any_order_of_ranks(p):
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        vectors = [[(nan, inf, 1.0)[k], (inf, 1.0, 2.0)[k], 3.0, 0.0, -0.0] for k in order]
        found = on_ranks(vectors, p)
        assert same_bits([one.sums for one in found])
        assert isnan(found[0].norm)
        assert isnan(found[0].sums[0].item())
        assert found[0].sums[1:].tolist() == [inf, 3.0 if p == inf else 9.0, 0.0, 0.0]


@BOTH
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_with_other_codes_or_a_fault_disagree_on_all(size, p):
    def camps(codes: Sequence[int], faulty: Sequence[int] = ()) -> set[bool]:
        def use(group: SimulatedGroup) -> bool:
            rank = group.rank
            return reduced(group, vector(FIRST), p, codes[rank], rank in faulty).disagree

        return set(simulate(use, size, collectives=1))

    for code in (0, 1, 7, CODES - 1, CODES + 3):
        assert camps([code] * size) == {False}
        assert camps([code] * (size - 1) + [code + 1]) == {True}
        for rank in range(size):
            assert camps([code] * size, [rank]) == {True}
            assert camps([0 if rank == other else code for other in range(size)], [rank]) == {True}
        assert camps([code] * size, range(size)) == {True}


@BOTH
@pytest.mark.parametrize("length", [None, 5])
def test_a_rank_that_has_failed_takes_part_with_a_message_of_the_same_length(length, p):
    own = 1.0 if length is None else vector(FIRST)

    def use(group: SimulatedGroup) -> str:
        if group.rank == 1:
            return str(tell_others(group, CPU, p, [False], KeyError("weight"), "clip_()", length))
        assert reduce_norm(group, own, p, 7, False, [False], slots=SLOTS).disagree is True
        return who_differs(group, CPU, "clip_()")

    first, told, third = simulate(use, 3, collectives=4)
    assert told == "None"
    assert "rank 1: stopped: KeyError 'weight'" in first
    assert third == first


@POWERS
def test_where_every_rank_holds_all_own_is_what_this_rank_has_sent_for_the_norm(p):
    for rank, one in enumerate(on_ranks(VECTORS, p, replicated=True)):
        sent = vector(VECTORS[rank])[:SLOTS]
        assert one.own == (sent.max() if p == inf else sent.sum()).item()


@POWERS
def test_one_process_sends_nothing_and_has_its_vector_back(p):
    own = vector(FIRST)
    found = reduce_norm(ClippingGroup.alone(), own, p, 7, False, [True, False], slots=SLOTS)
    assert found.sums is own
    assert isinstance(found.norm, float)
    assert found.read() == (pytest.approx(norm_of(own, p), rel=1e-15), False, [True, False])


@POWERS
@pytest.mark.parametrize("numbers", [(), FIRST])
def test_a_vector_without_slots_has_a_norm_of_zero(numbers, p):
    def use(group: ClippingGroup | SimulatedGroup) -> tuple[float, int]:
        found = reduce_norm(group, vector(numbers), p, 7, False, ())
        return found.norm, len(found.sums)

    assert [use(ClippingGroup.alone()), *simulate(use, 2, collectives=1)] == [(0.0, len(numbers))] * 3


def test_unscaled_divides_the_norm_and_leaves_the_vector():
    found = reduce_norm(ClippingGroup.alone(), vector(FIRST), 2.0, 7, False, (), slots=SLOTS)
    halved = found.unscaled(2.0, 2.0)
    assert halved.norm == found.norm / 2
    assert halved.sums is found.sums


@BOTH
def test_the_norm_of_many_slots_does_not_depend_on_the_number_of_threads(p):
    """torch's own sum does."""
    numbers = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(combined(numbers, p))
    finally:
        torch.set_num_threads(before)
    assert same_bits(found)
    assert found[0].item() == pytest.approx(numbers.max().item() if p == inf else numbers.sum().item(), rel=1e-12)


# ---- on an accelerator --------------------------------------------------------------------------------------


BAD = ((1.0, inf, 0.0, 1.0, 2.0), (1.0, nan, 0.0, inf, 2.0))  # of two ranks


def on_the_accelerator() -> dict[str, Any]:
    """By p and number of flags, or what else is tried."""
    use_accelerator()
    group, found = ClippingGroup.of(None), {}
    with patch("torch.distributed.all_reduce", all_reduce):
        for p in (0.5, 1.0, 2.0, 3.0, inf):
            for flags in ([], [True, False]):
                found[f"{p:g} {len(flags)}"] = measured(group, vector(VECTORS[group.rank]), p, flags)
            found[f"{p:g} number"] = measured(group, vector(VECTORS[group.rank])[2], p, [])
            found[f"{p:g} bad"] = measured(group, vector(BAD[group.rank]), p, [])
            found[f"{p:g} code"] = against_others(group, p, 7 + group.rank, False)
            found[f"{p:g} fault"] = against_others(group, p, 7, group.rank == 1)
    return found


def measured(group: ClippingGroup, own: Tensor, p: float, flags: list[bool]) -> tuple[Any, ...]:
    """Launches, what is read, and the vector."""
    here = own.to(DEVICE)
    with no_waits(), counted_launches() as launches:
        one = reduce_norm(group, here, p, 7, False, flags, slots=SLOTS)
    assert same_bits([here.cpu(), own])
    return len(launches), *one.read(), None if one.sums is None else one.sums.cpu()


def against_others(group: ClippingGroup, p: float, code: int, faulty: bool) -> tuple[float, bool, bool]:
    """Norm and disagreement, as they are read and as a copy for the host has them, beside what this rank has sent."""
    own = vector(VECTORS[group.rank]).to(DEVICE)
    with no_waits():
        one = reduce_norm(group, own, p, code, faulty, (), True, slots=SLOTS)
        for_host = one.for_host(torch.device(DEVICE))
    numbers = one.from_copy(for_host.tolist())
    assert numbers.own == (max if p == inf else sum)(VECTORS[group.rank][:SLOTS])
    assert isnan(numbers.norm)
    return one.norm.item(), one.disagree.item(), numbers.disagree > 0


@pytest.fixture(scope="module")
def accelerated() -> list[dict[str, Any]]:
    return run_ranks(on_the_accelerator, 2, fresh=True)


ACCELERATED = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")


@ACCELERATED
@POWERS
@pytest.mark.parametrize("flags", [0, 2])
def test_an_accelerator_gets_the_same_without_a_host_sync_in_few_kernels(accelerated, flags, p):
    expected = on_ranks(VECTORS[:2], p)[0]
    first, second = (found[f"{p:g} {flags}"] for found in accelerated)
    launches, norm, disagree, answers, sums = first
    assert same_bits([first[1:], second[1:]])
    assert same_bits([sums, expected.sums])
    assert norm == pytest.approx(expected.norm, rel=1e-15)
    assert (disagree, answers) == (False, [True, False][:flags])
    assert launches <= (8 if p == inf else 6) + flags  # the flags of this rank are two numbers, filled by two kernels


@ACCELERATED
@POWERS
def test_a_number_costs_as_few_kernels(accelerated, p):
    """For p = inf it was 24 when what is not finite had a word of its own."""
    (launches, norm, *_), (_, other, *_) = (found[f"{p:g} number"] for found in accelerated)
    assert launches <= (7 if p == inf else 5)
    assert same_bits([norm, other])
    assert norm == pytest.approx(norm_of(together([[FIRST[2]], [SECOND[2]]], p), p), rel=1e-15)


@ACCELERATED
@POWERS
def test_what_is_not_finite_stays_in_its_slot_on_an_accelerator(accelerated, p):
    for found in accelerated:
        _, norm, _, _, sums = found[f"{p:g} bad"]
        one, slot, zero, infinite, two = sums.tolist()
        assert (isnan(norm), isnan(slot), zero, infinite) == (True, True, 0.0, inf)
        assert (one, two) == ((1.0, 2.0) if p == inf else (2.0, 4.0))


@ACCELERATED
@POWERS
@pytest.mark.parametrize("why", ["code", "fault"])
def test_where_ranks_disagree_the_norm_is_nan_on_an_accelerator(accelerated, why, p):
    for found in accelerated:
        norm, *disagree = found[f"{p:g} {why}"]
        assert isnan(norm)
        assert disagree == [True, True]
