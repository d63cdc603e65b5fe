"""Commands of the documents are ones that the command line takes; docs/commands.py runs them, which takes minutes."""

import runpy
import shlex
from pathlib import Path

import pytest

from distclip.cli import parser_of_commands
from distclip.train.parse import read_config

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs/commands.py"))
SHOWN = [command for page in SCRIPT["pages"]() for command in SCRIPT["commands"](page)]
OURS = {
    c.place: shlex.split(c.text.replace("\\\n", " ").partition("distclip ")[2]) for c in SHOWN if "distclip " in c.text
}


@pytest.mark.parametrize("words", [words for words in OURS.values() if words], ids=str)
def test_the_command_line_takes_a_command_that_is_shown(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    known, others = parser_of_commands().parse_known_args(words)
    if known.command == "train":
        read_config(known.config, known.overrides)
    assert not others


def test_a_command_that_is_not_run_is_one_that_is_shown():
    texts = "\n".join(command.text for command in SHOWN)
    assert not [part for part in (*SCRIPT["SKIPPED"], *SCRIPT["TAKES_LONG"]) if part not in texts]
