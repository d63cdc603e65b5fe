"""Whatever a file holds, it is read or refused in one line, and no other way."""

import contextlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings, strategies as st

from distclip.runs import RunError, open_runs

LINES = b'{"step": 1, "norm": 2.0, "coef": 0.5, "skip": false}\n{"step": 2, "norm": "NaN", "culprit": "w has NaN"}\n'
TABLE = b"step,grad_norm,loss\n1,2.0,3.0\n2,,2.5\n3,1.0,\n"
STATE = json.dumps({"log_history": [{"step": 1, "grad_norm": 2.0}, {"step": 2, "eval_loss": 1.0}]}, indent=1).encode()
COLUMNS = b'{"step": {"0": 1, "1": 2}, "grad_norm": {"0": 1.0, "1": 2.0}}'
NAMES = ["log.jsonl", "metrics.csv", "trainer_state.json", "history.json", "events.out.tfevents.1"]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["0", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["step", "norm", "grad_norm", "loss", "skip", "x"]), VALUES), max_size=5
)


def read_or_refused(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        for place in (path, path.parent):
            with contextlib.suppress(RunError):
                for run in open_runs(place):
                    assert len(run.step) == len(run.norm) == len(run.loss) > 0


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    whole = draw(st.sampled_from([LINES, TABLE, STATE, COLUMNS]))
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    return whole[:start] + draw(st.binary(max_size=6)) + whole[end:]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.one_of(broken(), st.binary(max_size=60)))
@example("metrics.csv", b'step,grad_norm\n1,"2\n')
@example("history.json", b'[1, {"step": 1, "grad_norm": 2}]')
@example("log.jsonl", b'{"step": 1e400, "norm": 1}\n')
def test_any_bytes_are_read_or_refused(name, content):
    pytest.importorskip("tensorboard")
    read_or_refused(name, content)


@settings(max_examples=200, deadline=None)
@given(RECORDS, st.booleans())
@example([{"step": 10**400, "norm": 1.0}], True)
@example([{"step": "1", "norm": "2e3"}], False)
def test_any_records_are_read_or_refused(records, as_lines):
    content = "\n".join(map(json.dumps, records)) if as_lines else json.dumps(records)
    read_or_refused("log.jsonl" if as_lines else "history.json", content.encode())
