"""docs/reference/config.md and cli.md show what the code has, and configs read back as themselves."""

import re
import runpy

import pytest

from distclip.train.document import parse
from distclip.train.parse import flat, read_config, sections, to_yaml
from distclip.train.policies import CATALOGUE, KINDS, NONE
from distclip.train.tasks.registry import TASKS
from train.commands import CONFIGS, ROOT


def test_the_tables_of_the_reference_are_those_of_the_code():
    pages = runpy.run_path(str(ROOT / "docs/generate.py"))["pages"]()
    stale = [page.name for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    assert not stale, "run python docs/generate.py"


def test_every_key_is_in_the_reference_with_words():
    table = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    words = dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", table.partition("## Fields")[0], re.MULTILINE))
    words |= dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", table.partition("## parallel")[2], re.MULTILINE))
    real = {key for task in TASKS for name, type_ in sections(task).items() for key, _ in flat(name, type_)}
    assert set(words) == real | {f"clip.{kind}" for kind in KINDS}
    assert not [key for key, said in words.items() if not said]
    assert {*re.findall(r"`([\w.]+)`", table.partition("| `clip.policy` |")[2].partition("| max_norm |")[0])} == {
        *CATALOGUE,
        NONE,
    }


@pytest.mark.parametrize("name", ["quickstart", "classifier", "digits"])
def test_the_resolved_config_reads_back_as_itself(name, tmp_path):
    config = read_config(CONFIGS / f"{name}.yaml", ["clip.policy=autoclip", "clip.window=7", "run.dir=x"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
    assert config.clip.policy.window == 7


@pytest.mark.parametrize("name", ["1e3", "inf", "-inf", "on", "007", "null", "1_0"])
def test_a_name_that_looks_like_a_number_is_still_a_text_in_the_run_folder(name, tmp_path):
    """1e3 was written without quotes, and a run of that name could not go on."""
    config = read_config(CONFIGS / "digits.yaml", [f"name='{name}'"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_words_and_numbers_are_those_of_yaml_1_2():
    text = "{on: off, yes: No, a: true, b: False, c: trueish, d: 1e-3, e: 1e3x, f: 2e5}"
    wanted = {"on": "off", "yes": "No", "a": True, "b": False, "c": "trueish", "d": 0.001, "e": "1e3x", "f": 2e5}
    assert parse(text) == wanted
