"""Our messages meet nobody else's: not those of another call, nor what a rank that misses a call sends instead."""

import gc
import os
import re
import time
import warnings
from datetime import timedelta
from math import inf

import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.ranks import roll_call, slow_collective
from distclip.ranks.connections import ANY_LENGTH, all_reduce, channel, open_channel
from distclip.ranks.group import ClippingGroup
from distclip.ranks.message import reduce_norm
from support.ranks import LIMIT, count_collectives, run_ranks


def gradient(value: float = 3.0) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), value)
    return parameter


def message_of(call) -> str:
    try:
        return str(call())
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def another_sum_of_two_words() -> tuple[str, list[float]]:
    """Rank 1 sums two float64 words of its own, in the same group, in place of clipping."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    dist.barrier(group)
    metrics = torch.tensor([5.0, 1.0], dtype=torch.float64)
    if dist.get_rank() == 1:
        said = message_of(lambda: dist.all_reduce(metrics, group=group))
    else:
        said = message_of(lambda: distclip.clip_grad_norm_([gradient()], 1.0, group=group))
    return said, metrics.tolist()


def test_what_another_rank_sums_instead_is_not_taken_for_a_message():
    (first, _), (second, metrics) = run_ranks(another_sum_of_two_words, 2, fresh=True)
    assert first.startswith("RuntimeError: a collective of the clipping group failed in clip_grad_norm_(max_norm=1.0,")
    assert "rank 1 did not join or died" in first
    assert second.startswith("RuntimeError: ")
    assert metrics == [5.0, 1.0]


def another_length() -> str:
    group = dist.new_group(timeout=timedelta(seconds=2))
    norm_type = inf if dist.get_rank() == 2 else 2.0
    return message_of(lambda: distclip.clip_grad_norm_([gradient()], 1.0, norm_type, group=group))


def test_calls_of_other_lengths_wait_for_each_other_and_name_each_other():
    first, second, third = run_ranks(another_length, 3, fresh=True)
    for said in (first, second):
        assert "rank 2 did not join or died, rank 2 was in clip_grad_norm_(max_norm=1.0, norm_type=inf" in said
    assert "ranks 0, 1 did not join or died, only rank 2 did, rank 0 was in clip_grad_norm_(" in third


def another_operation() -> str:
    """Both send three numbers. Added up and maximised by turns, rank 1 took them for a norm that all agreed on."""
    group = ClippingGroup.of(dist.new_group(timeout=timedelta(seconds=2)))
    first = dist.get_rank() == 0
    return message_of(lambda: reduce_norm(group, 1.0, 2.0 if first else inf, 5, False, (False,) if first else ()))


def test_as_many_numbers_to_be_added_and_to_be_maximised_do_not_meet():
    for rank, said in enumerate(run_ranks(another_operation, 2, fresh=True)):
        assert f"rank {1 - rank} did not join or died, only rank {rank} did" in said


def reuse() -> tuple[list[float], dict[str, int], bool]:
    """Five calls, three of one length; channels are opened by the first of each, and no rank counts them."""
    world = dist.group.WORLD
    if dist.get_rank() == 1:
        dist.new_group([1], use_local_synchronization=True)  # this rank has made more groups than the other
    with count_collectives() as counts:
        norms = [distclip.clip_grad_norm_([gradient()], inf, p, group=world).item() for p in (2, inf, 2, inf, 2)]
    return norms, dict(counts), channel(world, 4) is channel(ClippingGroup.of(None).process_group, 4) is not None


def test_a_channel_is_opened_once_by_ranks_with_other_numbers_of_groups():
    for norms, counts, same in run_ranks(reuse, 2):
        assert norms == [3.0] * 5  # copies of one gradient
        assert counts == {"allreduce": 5}
        assert same


def again_and_again(folder: str) -> list[tuple[float, int]]:
    """The default group is made anew, with the same name, while the job's store stays the same to us."""
    rank, size, limit = dist.get_rank(), dist.get_world_size(), timedelta(seconds=20)
    kept = dist.FileStore(f"{folder}/kept", size)
    distclip.ranks.connections.c10d._get_default_store = lambda: kept
    found = []
    dist.barrier()  # or a rank that connects slowly would meet one that is gone
    for again in range(4):
        dist.destroy_process_group()
        gc.collect()
        threads = len(os.listdir("/proc/self/task"))
        store = dist.FileStore(f"{folder}/{again}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        clipper = distclip.Clipper(nn.ParameterList([gradient()]), 1.0)
        found.append((clipper.clip_().norm.item(), threads))
    return found


def test_a_group_of_the_same_name_has_channels_of_its_own_and_leaves_none(tmp_path):
    for found in run_ranks(again_and_again, 2, str(tmp_path), fresh=True):
        assert [norm for norm, _ in found] == [3.0] * 4
        assert len({threads for _, threads in found}) == 1


def a_group_of_one_before(folder: str) -> tuple[list[float], bool]:
    """Rank 0 reduces in a group of its own, whose name a group of both has after the default group is made anew."""
    rank = dist.get_rank()
    alone = dist.new_group([0])
    if rank == 0:
        all_reduce(ClippingGroup.of(alone), torch.ones(2), signed_length=2)
    name = alone.group_name if rank == 0 else None
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", 2), rank=rank, world_size=2)
    both = dist.new_group(timeout=timedelta(seconds=10))
    total = all_reduce(ClippingGroup.of(both), torch.ones(2), signed_length=2)
    return total.tolist(), name in (None, both.group_name)


def test_ranks_find_each_other_where_one_had_a_group_of_this_name_alone(tmp_path):
    assert run_ranks(a_group_of_one_before, 2, str(tmp_path), fresh=True) == [([2.0, 2.0], True)] * 2


def timeouts() -> list[timedelta]:
    group = dist.new_group(timeout=timedelta(seconds=7))
    own = open_channel(group, ANY_LENGTH).own._get_backend(torch.device("cpu"))
    return [own.options._timeout, dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout]


def test_a_channel_has_the_timeout_of_its_group():
    assert run_ranks(timeouts, 2) == [[timedelta(seconds=7), timedelta(seconds=LIMIT)]] * 2


def a_channel_that_not_all_open() -> tuple[str, list[str]]:
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        return "was not there", roll_call.awaited
    said = message_of(lambda: all_reduce(ClippingGroup.of(group), torch.ones(2), signed_length=2, call="step 1"))
    return said, roll_call.awaited


def test_who_does_not_come_to_open_it_is_named():
    first, *others = run_ranks(a_channel_that_not_all_open, 3, fresh=True)
    assert first == ("was not there", [])
    for said, waits_in in others:
        assert waits_in == ["step 1"]  # as the roll call of the whole job hears of it
        assert said.startswith("RuntimeError: a collective of the clipping group failed in step 1: rank 0 did not join")


# ---- waiting -----------------------------------------------------------------------------------------------


def warnings_of(*calls: str) -> list[str]:
    """What this rank is told in collectives of these names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            all_reduce(ClippingGroup.of(None), torch.ones(2), signed_length=2, call=call)
    return [f"{warning.category.__name__}: {warning.message}" for warning in caught]


def long_wait() -> list[str]:
    """Rank 2 comes when the others have looked more than three times."""
    slow_collective.LONG = 3
    said = warnings_of("step 6")
    if dist.get_rank() == 2:
        time.sleep(6)
    return said + warnings_of("step 7", "step 8")


def test_one_of_those_who_wait_for_long_says_for_whom():
    first, second, late = run_ranks(long_wait, 3, fresh=True)
    assert late == []
    (said,) = first + second
    assert re.fullmatch(
        r"RuntimeWarning: rank [01] has waited for 3 s in step 7: rank 2 has not joined\. Every rank of .*", said
    )


def short_wait() -> tuple[list[str], list[bool], list[str]]:
    """Rank 1 comes after two looks; it waits for less than one itself, on a busy machine too."""
    store = dist.distributed_c10d._get_default_store()
    said = warnings_of("step 6")
    if dist.get_rank() == 1:
        time.sleep(3)
    said += warnings_of("step 7")
    dist.barrier()
    told = [store.check([f"distclip/waits/{dist.group.WORLD.group_name}/2/1/2/{rank}"]) for rank in (0, 1)]
    return said, told, roll_call.awaited


def test_who_waits_for_a_moment_tells_nobody_but_the_store():
    assert run_ranks(short_wait, 2, fresh=True) == [([], [True, False], [])] * 2
