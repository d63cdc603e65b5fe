"""docs/howto/train.md lists every key of the config and no other."""

import re

import pytest

from distclip.train.document import parse
from distclip.train.parse import flat, read_config, sections, to_yaml
from distclip.train.policies import CATALOGUE, KINDS, NONE
from distclip.train.tasks.registry import TASKS
from train.commands import CONFIGS, ROOT


def test_every_key_is_in_the_document():
    table = (ROOT / "docs" / "howto" / "train.md").read_text().partition("## Every key")[2]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    documented = {key for cell in first_cells for key in re.findall(r"`([\w.]+)`", cell)}
    real = {key for task in TASKS for name, type_ in sections(task).items() for key, _ in flat(name, type_)}
    assert documented == real | {f"clip.{kind}" for kind in KINDS}


def test_the_document_names_every_policy():
    table = (ROOT / "docs" / "howto" / "train.md").read_text().partition("| `clip.policy` |")[2].partition("\n")[0]
    assert {*re.findall(r"`([\w.]+)`", table)} == {*CATALOGUE, NONE}


@pytest.mark.parametrize("name", ["quickstart", "classifier", "digits"])
def test_the_resolved_config_reads_back_as_itself(name, tmp_path):
    config = read_config(CONFIGS / f"{name}.yaml", ["clip.policy=autoclip", "clip.window=7", "run.dir=x"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
    assert config.clip.policy.window == 7


def test_words_and_numbers_are_those_of_yaml_1_2():
    text = "{on: off, yes: No, a: true, b: False, c: trueish, d: 1e-3, e: 1e3x, f: 2e5}"
    wanted = {"on": "off", "yes": "No", "a": True, "b": False, "c": "trueish", "d": 0.001, "e": "1e3x", "f": 2e5}
    assert parse(text) == wanted
