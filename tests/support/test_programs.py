"""Programs that tests run as torchrun would: how they end is what they say and what they print."""

from pathlib import Path

import pytest

from support.programs import play
from support.ranks import LIMIT

TALK = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(rank)
print(f"{os.environ['LOCAL_RANK']} of {dist.get_world_size()}: {rank.item()}, {torch.get_num_threads()} thread")
dist.destroy_process_group()
"""
SECOND_FAILS = """
import os, time
if os.environ["RANK"] == "1":
    raise ValueError("of rank 1")
time.sleep(1000)
"""


def program(folder: Path, text: str) -> Path:
    file = folder / "program.py"
    file.write_text(text)
    return file


def test_ranks_find_each_other_and_what_they_print_is_kept(tmp_path):
    codes, output = play(program(tmp_path, TALK), 3, [], LIMIT)
    assert codes == [0] * 3
    assert sorted(output.splitlines()) == [f"{rank} of 3: 6, 1 thread" for rank in range(3)]


def test_the_others_are_stopped_where_one_fails(tmp_path):
    codes, output = play(program(tmp_path, SECOND_FAILS), 2, [], LIMIT)
    assert (codes[0] < 0, codes[1]) == (True, 1)
    assert "ValueError: of rank 1" in output


@pytest.mark.parametrize(
    ("text", "limit", "code"), [("import sys; sys.exit(3)", LIMIT, 3), ("import time; time.sleep(60)", 2, -15)]
)
def test_one_process_ends_by_itself_or_by_the_limit(text, limit, code, tmp_path):
    assert play(program(tmp_path, text), None, [], limit)[0] == [code]
