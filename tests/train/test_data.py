"""Batches are a function of the step, for any number of ranks; each task reads what its config says."""

import csv
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from distclip.train.dataset import Batches, Dataset, Split
from distclip.train.problem import ConfigError
from distclip.train.tasks.digits import DigitsData, load_digits
from distclip.train.tasks.rows import RowsData, hashed, load_rows, read_rows
from distclip.train.tasks.text import TextData, load_text
from train.commands import CONFIGS


def split(samples: int) -> Split:
    return Split(inputs=torch.arange(samples), targets=torch.arange(samples))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_any_number_of_ranks_sees_the_same_global_batches(world):
    alone = Batches(split=split(50), batch_size=12, seed=3)
    ranks = [Batches(split=split(50), batch_size=12, seed=3, rank=r, world=world) for r in range(world)]
    for step in (0, 1, 3, 4, 5, 100):
        assert torch.cat([rank.at(step)[0] for rank in ranks]).equal(alone.at(step)[0])


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    batches = Batches(split=split(50), batch_size=12, seed=3)
    assert batches.epoch_steps == 4  # two samples are left out
    first, second = (torch.cat([batches.at(step)[0] for step in steps]) for steps in (range(4), range(4, 8)))
    assert len(set(first.tolist())) == 48
    assert len(set(second.tolist())) == 48
    assert not first.equal(second)
    assert not first.equal(torch.arange(48))


def test_the_seed_changes_the_order():
    one, other = (Batches(split=split(50), batch_size=12, seed=seed).at(0)[0] for seed in (0, 1))
    assert not one.equal(other)


def test_a_batch_must_be_cut_into_equal_parts():
    with pytest.raises(ConfigError, match="12 cannot be cut into equal parts for 5 processes"):
        Batches(split=split(50), batch_size=12, seed=0, rank=0, world=5)


def test_entropy_is_that_of_the_held_out_targets():
    targets = torch.tensor([0, 0, 0, 1])
    held_out = Split(inputs=targets, targets=targets)
    dataset = Dataset(train=split(4), held_out=held_out, symbols=3, classes=3, about="")
    assert dataset.entropy() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_text_is_cut_into_windows_each_beside_the_next_characters(tmp_path: Path):
    text = "abcdefghij" * 4
    (tmp_path / "text.txt").write_text(text)
    dataset = load_text(TextData(path=str(tmp_path / "text.txt"), length=4, held_out=0.25), seed=0)
    symbols = "?abcdefghij"  # 0 stands for a character that training has not seen
    read = ["".join(symbols[i] for i in row) for row in dataset.train.inputs.tolist()]
    follow = ["".join(symbols[i] for i in row) for row in dataset.train.targets.tolist()]
    assert "".join(read) == text[:28]
    assert "".join(follow) == text[1:29]
    assert (dataset.symbols, dataset.classes) == (11, 11)
    assert "".join(symbols[i] for i in dataset.held_out.inputs.flatten().tolist()) == text[30:38]


def test_a_character_that_training_has_not_seen_is_unknown(tmp_path: Path):
    (tmp_path / "text.txt").write_text("ab" * 20 + "z" * 20)
    dataset = load_text(TextData(path=str(tmp_path / "text.txt"), length=4, held_out=1 / 3), seed=0)
    assert dataset.symbols == 3
    assert set(dataset.held_out.targets.flatten().tolist()) == {0}


def test_a_folder_is_read_in_an_order_that_only_the_seed_changes(tmp_path: Path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    (tmp_path / "picture.png").write_text("x" * 10)
    data = TextData(path=str(tmp_path), length=2, held_out=0.2)
    first, again, other = (load_text(data, seed).train.inputs for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    assert load_text(data, 0).symbols == 6  # unknown and the five letters of the part that is not held out


def test_the_standard_library_is_there_and_bounded():
    dataset = load_text(TextData(max_chars=50_000), seed=0)
    assert dataset.train.inputs.numel() + dataset.held_out.inputs.numel() <= 50_000
    assert 60 < dataset.symbols < 200
    assert 2.5 < dataset.entropy() < 3.5  # program text: about 3.0 nats a character


def test_words_are_hashed_alike_in_every_process():
    # CRC-32's published check value is 0xCBF43926 = 3421780262; 0 is kept for the end of a row
    assert hashed("123456789 (123456789)", 5, 1000) == [263, hashed("(", 1, 1000)[0], 263, hashed(")", 1, 1000)[0], 0]
    assert hashed("one two three", 2, 1000) == hashed("one two", 2, 1000)


def test_rows_keep_text_and_label_together(tmp_path: Path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "comment_text", "toxic"])
        writer.writerows([i, "bad\nword" if i % 3 == 0 else "kind, word", int(i % 3 == 0)] for i in range(30))
    data = RowsData(path=str(tmp_path / "rows.csv"), text_column="comment_text", label_column="toxic", length=3)
    dataset = load_rows(data, seed=0)
    assert (len(dataset.train), len(dataset.held_out)) == (24, 6)
    rows = torch.cat([dataset.train.inputs, dataset.held_out.inputs])
    labels = torch.cat([dataset.train.targets, dataset.held_out.targets])
    assert labels.sum() == 10
    wanted = {0: hashed("kind, word", 3, data.buckets), 1: hashed("bad word", 3, data.buckets)}
    assert all(row == wanted[label] for row, label in zip(rows.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_rows_are_read_in_their_encoding_whatever_mark_is_in_front(encoding, tmp_path: Path):
    """Excel begins UTF-8 with a mark: the first column was not found."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"caf\xe9 {i},{i % 2}\n" for i in range(9)), encoding=encoding)
    said = "utf-8" if encoding == "utf-8-sig" else encoding
    read = list(read_rows(RowsData(path=str(path), encoding=said)))
    assert read == [(f"caf\xe9 {i}", i % 2) for i in range(9)]


def test_half_a_character_in_utf_7_is_a_word_like_others(tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes(b"text,label\n" + b"+2AA- a,0\nb,1\n" * 9)
    dataset = load_rows(RowsData(path=str(tmp_path / "rows.csv"), encoding="utf-7", length=2), seed=0)
    assert set(map(tuple, dataset.train.inputs.tolist())) == {
        tuple(hashed(text, 2, 4096)) for text in ("\ud800 a", "b")
    }


def test_the_shipped_rows_are_different_mostly_negative_and_of_no_machine():
    with (CONFIGS / "data" / "prose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["label"] for row in rows) == {"0": 2800, "1": 400}
    assert len({row["text"] for row in rows}) == 3200
    assert not [row for row in rows if re.search(r"/root|pyenv|/home/\w+", row["text"])]  # where Python was built


def test_digits_are_split_without_overlap():
    dataset = load_digits(DigitsData(), seed=0)
    assert dataset.train.inputs.shape == (1500, 16, 4)
    assert dataset.held_out.inputs.shape == (297, 16, 4)
    assert dataset.train.inputs.max() == 1
    seen = {bytes(row) for row in (dataset.train.inputs * 16).byte().flatten(1).tolist()}
    assert not any(bytes(row) in seen for row in (dataset.held_out.inputs * 16).byte().flatten(1).tolist())
