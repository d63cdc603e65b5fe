"""`name_lost_ranks`: what a rank hears of another that is gone, and what is none of its business."""

from pathlib import Path

import pytest

from distclip.ranks import name_lost_ranks
from support.programs import play

LOOP = """
import os, sys, torch, torch.distributed as dist
from distclip.ranks import name_lost_ranks

dist.init_process_group("gloo")
words, rank = torch.ones(2), dist.get_rank()
try:
    with name_lost_ranks():
        dist.all_reduce(words)
        if rank == 1:
            LEAVE
        dist.all_reduce(words)
        dist.all_reduce(words)
    print(f"{rank}: finished", flush=True)
except (RuntimeError, ValueError) as error:
    said = str(error).replace(chr(10), "|")
    print(f"{rank}: {type(error).__name__}: {said} <- {type(error.__cause__).__name__}", flush=True)
os._exit(0)  # as a process that ends: with its connections closed
"""


def told(folder: Path, leave: str) -> list[str]:
    """What three ranks print, in their order; rank 1 does ``leave`` between two collectives."""
    program = folder / "program.py"
    program.write_text(LOOP.replace("LEAVE", leave))
    _, output = play(program, 3, [str(Path(__file__).parents[2])], limit=60)
    return sorted(line for line in output.splitlines() if line[:2] in ("0:", "1:", "2:"))


def test_a_rank_that_leaves_by_an_exception_is_quoted(tmp_path):
    first, mine, third = told(tmp_path, 'raise ValueError("rows\\nof another file")')
    assert mine == "1: ValueError: rows|of another file <- NoneType"  # as it was, for the rank itself
    for story in (first, third):
        assert story[2:].startswith(" RuntimeError: rank 1 failed: ValueError: rows of another file (")
        assert story.endswith(" <- RuntimeError")  # torch's own is the cause


def test_a_rank_that_dies_is_named(tmp_path):
    first, third = told(tmp_path, "os._exit(0)")
    for story in (first, third):
        assert story[2:].startswith(" RuntimeError: no answer from rank 1: dead, stopped or out of reach (")


def test_a_loop_that_ends_is_left_alone(tmp_path):
    assert told(tmp_path, "pass") == [f"{rank}: finished" for rank in range(3)]


def test_a_runtime_error_of_the_loop_itself_passes_as_it_is(tmp_path):
    stories = told(tmp_path, 'pass\n        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")')
    assert stories == [f"{k}: RuntimeError: mat1 and mat2 shapes cannot be multiplied <- NoneType" for k in range(3)]


def test_where_there_is_no_group_there_is_no_store():
    with pytest.raises(RuntimeError, match="call init_process_group first"), name_lost_ranks():
        pass
