"""Any run folder that a run is told to go on with: it goes on, or one line says what in it cannot be."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from fuzz.documents import DOCUMENTS, broken, keys_of, lay_out, mutated, spelled, values
from fuzz.promise import command, fuzz, keeps_promise

RUN = Path("run")
RECORD = {"step": 1, "epoch": 1, "loss": 0.5, "norm": 2.0, "max_norm": 1.0, "coef": 0.5, "skip": False}


def prepare(folder: Path) -> None:
    lay_out(folder)
    (folder / "rows.yaml").write_text(spelled(DOCUMENTS["rows"]))
    (folder / "secret").write_text("not to be written to")


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder, here = tmp_path_factory.mktemp("folders"), Path.cwd()
    prepare(folder)
    os.chdir(folder)
    yield
    os.chdir(here)


def lines() -> st.SearchStrategy[bytes]:
    """One line of metrics.jsonl: a record, one with other values, other JSON, or no JSON."""
    changed = st.dictionaries(st.sampled_from([*RECORD, "x", ""]), values, max_size=3)
    odd = ["[" * 100_000, "{}", "[]", "null", '{"step": NaN}', '{"step": 1e999}', "9" * 5000, "\ud800", " ", "\u2028"]
    return st.one_of(
        st.integers(0, 9).map(lambda step: json.dumps(RECORD | {"step": step})),
        changed.map(lambda change: json.dumps(RECORD | change, default=repr, skipkeys=True)),
        st.sampled_from(odd),
        st.text(max_size=10),
    ).map(lambda line: line.encode("utf-8", "surrogatepass") + b"\n") | st.binary(max_size=10)


NAMES = [
    "step-1",
    "step-00000001",
    "step-00000002",
    "step-99999999999999999999",
    "step-²",
    "step--1",
    "step-",
    "step-x",
]
NAMES += ["step-00000003.tmp", "step-00000003.damaged", "step-1e3", "step-१", "x" * 200, "\n", "step-00000004\n"]


@st.composite
def placed(draw: st.DrawFn, path: Path, content: bytes) -> None:
    """Put a file here, or something else in its place."""
    match draw(st.sampled_from(["file"] * 8 + ["folder", "pipe", "link", "loop", "nothing"])):
        case "file":
            path.write_bytes(content)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(Path("secret").absolute())
        case "loop":
            path.symlink_to(path.name)


@fuzz(60)
@given(data=st.data())
def test_any_run_folder(data):
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    before = DOCUMENTS["rows"] | {"run": {"dir": "run"}}
    if data.draw(st.booleans()):
        before = data.draw(mutated(before, keys_of("rows"), ["run"]))
    text = spelled(before).encode(errors="replace")
    if data.draw(st.sampled_from([False, False, True])):
        text = data.draw(broken(text.decode()))
    metrics = b"".join(data.draw(st.lists(lines(), max_size=3)))
    data.draw(placed(RUN / "config.yaml", text))
    data.draw(placed(RUN / "metrics.jsonl", metrics))
    data.draw(placed(RUN / "summary.json", b"{}"))
    if data.draw(st.sampled_from([True, True, True, False])):
        (RUN / "checkpoints").mkdir()
        for name in data.draw(st.sets(st.sampled_from(NAMES), max_size=3)):
            if data.draw(st.booleans()):
                (RUN / "checkpoints" / name).mkdir()
            else:
                data.draw(placed(RUN / "checkpoints" / name, b"x"))
    else:
        data.draw(placed(RUN / "checkpoints", b""))
    ended = command("train", "rows.yaml", "run.dir=run", "resume=true")
    keeps_promise(ended, [text, metrics, sorted(RUN.rglob("*"))])
    assert Path("secret").read_text() == "not to be written to"
