"""Any config file: it trains, or one line says what is wrong with it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from fuzz.documents import DOCUMENTS, TRAPS, broken, keys_of, lay_out, mutated, spelled
from fuzz.promise import command, fuzz, keeps_promise

FILE = "config.yaml"


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working folder with data, in which some things are no files."""
    folder, here = tmp_path_factory.mktemp("configs"), Path.cwd()
    lay_out(folder)
    os.chdir(folder)
    yield
    os.chdir(here)


@pytest.mark.parametrize("task", DOCUMENTS)
def test_the_configs_that_are_broken_below_work(task):
    Path(FILE).write_text(spelled(DOCUMENTS[task]))
    ended = command("train", FILE)
    assert ended.launched, ended
    keeps_promise(ended)


@fuzz(60)
@given(data=st.data())
def test_any_values(data):
    task = data.draw(st.sampled_from(list(DOCUMENTS)))
    text = spelled(data.draw(mutated(DOCUMENTS[task], keys_of(task), TRAPS)))
    Path(FILE).write_text(text, errors="surrogatepass")
    keeps_promise(command("train", FILE), text)


@fuzz(60)
@given(data=st.data())
def test_any_text(data):
    text = spelled(DOCUMENTS[data.draw(st.sampled_from(list(DOCUMENTS)))])
    raw = data.draw(st.one_of(broken(text), broken(text), broken(text), st.binary(max_size=50)))
    Path(FILE).write_bytes(raw)
    keeps_promise(command("train", FILE), raw[:5000])
