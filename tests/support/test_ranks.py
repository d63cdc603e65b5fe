"""The harness proves itself: a case that fails says why, on every rank, and does not spoil the next one."""

import ctypes
import functools
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from support.older_torch import cut
from support.ranks import RankError, count_collectives, run_ranks, same_bits


def rank_and_sum(value: int) -> tuple[int, int]:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("boom")
    dist.barrier()


def rank_one_stays_away(seconds: float) -> None:
    if dist.get_rank() == 1:
        time.sleep(seconds)
    dist.all_reduce(torch.ones(1))


def one_more_on_rank_zero() -> None:
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))


def return_a_lock() -> object:
    return threading.Lock()


def stuck() -> None:
    raise RuntimeError("stuck")


def cannot_leave() -> None:
    if dist.get_rank() == 1:
        dist.destroy_process_group = stuck


def die() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    if dist.get_rank() == 0:
        ctypes.string_at(0)


def exit_quietly() -> None:
    raise SystemExit(0)


def process_and_seed() -> tuple[int, float, int]:
    return os.getpid(), torch.rand(()).item(), torch.get_num_threads()


def warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def collectives_of_torch() -> list[dict[str, int]]:
    with count_collectives() as plain:
        dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX)
        dist.broadcast(torch.ones(2), src=0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with count_collectives() as of_a_dtensor:
        cut(torch.ones(4), mesh, [Shard(0)]).sum().full_tensor()
    model = fully_shard(torch.nn.Linear(4, 4), mesh=mesh)
    with count_collectives() as of_fsdp:
        model(torch.ones(1, 4)).sum().backward()
    replica = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    with count_collectives() as of_ddp:
        replica(torch.ones(1, 4)).sum().backward()
    return [dict(counts) for counts in (plain, of_a_dtensor, of_fsdp, of_ddp)]


def chapters(error: pytest.ExceptionInfo[RankError]) -> list[str]:
    return str(error.value).split("---- rank ")[1:]


def test_results_come_in_the_order_of_ranks():
    assert run_ranks(rank_and_sum, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_a_partial_function_and_a_single_rank_work():
    assert run_ranks(functools.partial(rank_and_sum, 10), 1) == [(0, 10)]


def test_ranks_are_kept_and_start_alike():
    # five: no other test has as many, whose groups might crowd these ranks until they are thrown away
    first, second = run_ranks(process_and_seed, 5), run_ranks(process_and_seed, 5)
    assert first == second
    assert first[0][1:] == first[1][1:] == (first[0][1], 1)


def test_fresh_ranks_are_nobody_elses():
    kept, fresh, again = (run_ranks(process_and_seed, 2, fresh=flag) for flag in (False, True, False))
    assert kept == again
    assert not {pid for pid, *_ in kept} & {pid for pid, *_ in fresh}


def test_two_calls_at_once_do_not_meet():
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(run_ranks, rank_and_sum, 2, value) for value in (10, 20)]
    assert [call.result() for call in calls] == [[(0, 21), (1, 21)], [(0, 41), (1, 41)]]


def test_an_exception_shows_its_traceback_and_where_the_other_rank_is():
    with pytest.raises(RankError, match=r"rank_one_raises on 2 ranks: .*rank 1: ValueError: boom") as error:
        run_ranks(rank_one_raises, 2)
    zero, one = chapters(error)
    assert "did not finish; it was here:" in zero
    assert " in barrier\n" in zero
    assert "Traceback" in one
    assert 'in rank_one_raises\n    raise ValueError("boom")\nValueError: boom' in one


def test_the_next_case_after_a_failure_works():
    before = run_ranks(process_and_seed, 2)
    with pytest.raises(RankError, match="boom"):
        run_ranks(rank_one_raises, 2)
    assert not {pid for pid, *_ in before} & {pid for pid, *_ in run_ranks(process_and_seed, 2)}


def test_groups_that_cannot_be_left_are_the_failure_of_the_case_that_made_them():
    with pytest.raises(RankError, match="cannot_leave on 2 ranks: rank 0: finished; rank 1: RuntimeError: stuck"):
        run_ranks(cannot_leave, 2)
    assert run_ranks(rank_and_sum, 2, 1) == [(0, 3), (1, 3)]


def test_a_hang_ends_within_its_limit_and_shows_which_rank_stayed_away():
    run_ranks(rank_and_sum, 2, 0)  # ranks that have started and imported this file
    with pytest.raises(RankError, match=r"ranks 0, 1: did not finish \(limit 4 s\)") as error:
        run_ranks(rank_one_stays_away, 2, 100.0, timeout=4.0)
    zero, one = chapters(error)
    assert " in all_reduce\n" in zero
    assert " in all_reduce\n" not in one
    assert " in rank_one_stays_away\n" in one


def test_one_collective_too_many_is_a_hang_of_that_rank():
    run_ranks(rank_and_sum, 2, 0)
    with pytest.raises(RankError, match="rank 0: did not finish; rank 1: finished"):
        run_ranks(one_more_on_rank_zero, 2, timeout=4.0)


def test_an_unpicklable_result_is_an_error_and_no_hang():
    with pytest.raises(RankError, match=r"ranks 0, 1: TypeError: cannot pickle '_thread.lock' object"):
        run_ranks(return_a_lock, 2)


def test_a_function_that_ranks_cannot_import_is_refused_at_once():
    with pytest.raises((AttributeError, TypeError, ValueError), match=r"pickle|local object"):
        run_ranks(lambda: None, 2)


@pytest.mark.parametrize(
    ("fn", "why"), [(die, "rank 0: died with exit code -9"), (exit_quietly, "ranks 0, 1: SystemExit: 0")]
)
def test_a_rank_that_ends_is_a_failure(fn, why):
    with pytest.raises(RankError, match=why):
        run_ranks(fn, 2)


def test_a_rank_that_crashes_shows_where_it_was():
    with pytest.raises(RankError, match="rank 0: died with exit code -11; rank 1: ") as error:
        run_ranks(crash, 2)
    zero, *_ = chapters(error)
    assert "Segmentation fault" in zero
    assert " in crash\n" in zero


def test_a_warning_is_an_error_on_a_rank_too():
    with pytest.raises(RankError, match="ranks 0, 1: UserWarning: careful"):
        run_ranks(warn, 2)


@pytest.mark.filterwarnings("ignore:careful")
def test_a_warning_that_the_test_allows_is_allowed_on_a_rank():
    assert run_ranks(warn, 2) == [None, None]


def test_collectives_are_counted_whoever_makes_them():
    for plain, of_a_dtensor, of_fsdp, of_ddp in run_ranks(collectives_of_torch, 2):
        assert plain == {"allreduce": 2, "broadcast": 1}
        assert of_a_dtensor == {"allreduce": 1}
        assert of_fsdp == {"allgatherbase": 1, "reducescatterbase": 1}
        assert of_ddp == {"allreduce": 1}


def test_same_bits_sees_what_equality_does_not():
    nan = float("nan")
    assert same_bits([torch.tensor(nan), torch.tensor(nan)])
    assert same_bits([{"norm": (1.0, torch.ones(2, dtype=torch.bfloat16))}] * 3)
    assert not same_bits([0.0, -0.0])
    assert not same_bits([torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)])
    assert not same_bits([torch.tensor(1.0), torch.tensor([1.0])])
    assert not same_bits([1.0, 1.0 + 2**-52])
    assert not same_bits([1, 1.0])
