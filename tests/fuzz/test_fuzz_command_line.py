"""Any words on the command line: they are obeyed, or one line says which of them cannot be."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from fuzz.documents import DOCUMENTS, TRAPS, bomb, keys_of, lay_out, spelled, values
from fuzz.promise import command, fuzz, keeps_promise

COMMANDS = ["train", "bench", "--version", "--help", "-h", "train --help", "Train", "", "-", "--"]
OPTIONS = ["--rounds", "--processes", "--json", "--device", "--list", "--help", "--", "-", "-x", "--verbose", "--round"]
VALUES = [
    "0",
    "-1",
    "1",
    "1e3",
    "nan",
    "9" * 30,
    "9" * 5000,
    "cpu",
    "cuda",
    "tpu",
    "true",
    "[1",
    "{a: b}",
    "é",
    "\udcff",
]
VALUES += ["plain", "fsdp2-small", "x" * 3000, "a\nb", "\x1b[31m", "=", "a=", "=b", ".=1", "a.b.c=1", "seed..x=1", "\0"]


def prepare(folder: Path) -> None:
    """A folder to stand in, with configs that work and things that are no files."""
    lay_out(folder)
    for task, document in DOCUMENTS.items():
        (folder / f"{task}.yaml").write_text(spelled(document))


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder, here = tmp_path_factory.mktemp("words"), Path.cwd()
    prepare(folder)
    os.chdir(folder)
    yield
    os.chdir(here)


@st.composite
def overrides(draw: st.DrawFn, task: str) -> str:
    """`key=value` with a key that is known, nearly known or unknown, and any value, as YAML or as any text."""
    key = ".".join(draw(st.sampled_from(keys_of(task))))
    key = draw(
        st.sampled_from([key, key, key, key, key.upper(), f"{key}.x", f"--{key}", f"-{key}", key[1:], f" {key}"])
    )
    texts = st.one_of(st.sampled_from(VALUES), st.text(max_size=10), st.sampled_from([bomb(False), bomb(True)]))
    if key.endswith(("path", "dir", "root", "name")):
        texts = st.sampled_from(TRAPS)
    else:
        texts = st.one_of(texts, values.map(repr))
    return draw(st.sampled_from(["{}={}"] * 8 + ["{}", "{}:{}", "{}=={}"])).format(key, draw(texts))


@fuzz(60)
@given(data=st.data())
def test_any_overrides(data):
    task = data.draw(st.sampled_from(list(DOCUMENTS)))
    words = data.draw(st.lists(overrides(task), min_size=1, max_size=4))
    keeps_promise(command("train", f"{task}.yaml", *words), words)


@fuzz(60)
@given(
    first=st.sampled_from(COMMANDS),
    others=st.lists(
        st.one_of(st.sampled_from(OPTIONS + VALUES + TRAPS + ["text.yaml"]), st.text(max_size=8)), max_size=6
    ),
)
def test_any_words(first, others):
    words = [*first.split(), *others]
    keeps_promise(command(*words), words)


@fuzz(30)
@given(
    launcher=st.fixed_dictionaries(
        {},
        optional={
            "RANK": st.sampled_from(["0", "1", "9", *VALUES[:-1]]),
            "WORLD_SIZE": st.sampled_from(["1", "2", *VALUES[:-1]]),
        },
    )
)
def test_any_launcher(launcher):
    """An environment that says it is a launcher's, and is not."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        for name, value in launcher.items():
            patch.setenv(name, value)
        ended = command("train", "rows.yaml", "parallel.processes=10000000")
        assert ended.code == 2
        if launcher == {"RANK": "1", "WORLD_SIZE": "2"}:
            assert ended.err == ""  # rank 0 speaks for it
        else:
            keeps_promise(ended, launcher)
