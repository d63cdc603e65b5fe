"""Configs that work, and ways to break them: values, keys, sections, and the text of the file itself."""

import copy
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from distclip.train.parse import flat, sections
from distclip.train.policies import CATALOGUE, KINDS, WRAPPERS

Document = dict[str, Any]
REST = {
    "seed": 0,
    "train": {"steps": 2, "batch_size": 4, "log_every": 1},
    "optim": {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.95], "warmup_steps": 1, "decay": "cosine"},
    "clip": {"policy": "autoclip", "percentile": 10.0, "window": 5, "max_norm": 1.0, "nonfinite": "skip"},
    "parallel": {"strategy": "ddp", "processes": 2},
    "run": {"root": "runs", "keep": 1},
}
DOCUMENTS: dict[str, Document] = {
    "text": {
        "task": "text",
        "name": "fuzz",
        "data": {"path": "words.txt", "length": 8, "suffixes": [".txt"], "held_out": 0.2},
        "model": {"width": 8, "layers": 1, "heads": 2},
        **REST,
    },
    "rows": {
        "task": "rows",
        "name": "fuzz",
        "data": {"path": "rows.csv", "length": 4, "buckets": 16, "held_out": 0.2},
        "model": {"width": 4, "dropout": 0.1},
        **REST,
    },
    "digits": {
        "task": "digits",
        "name": "fuzz",
        "data": {"pixels": 16, "held_out": 297},
        "model": {"width": 4},
        **REST,
    },
}
# things that are no ordinary files, and names that name nothing
TRAPS = [
    *("empty", "used", "zero.bin", "noise.bin", "pipe", "loop", "loop/x", "dangling", "locked", "words.txt"),
    *("rows.csv", "rows.csv/x", "pipe/x", "nowhere", ".", "", "a\0b", "a\nb", "x" * 300, "y/" * 3000, "\udcff", "~"),
    *("/dev/null", "/dev/null/x", "/proc/self/mem", "/dev/full", "-", "used/", "./rows.csv", "${HOME}", "$(id)"),
]


def lay_out(folder: Path) -> None:
    """The data of these configs, and the traps."""
    (folder / "words.txt").write_text(" ".join(f"the quick brown fox number {i} jumps over the dog" for i in range(40)))
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"row number {i},{i % 2}\n" for i in range(30)))
    (folder / "empty").mkdir()
    (folder / "used").mkdir()
    (folder / "used" / "thesis.tex").touch()
    (folder / "zero.bin").touch()
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 20)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "locked").mkdir(mode=0)


HUGE = [2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, -(10**30), 10**400]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from(HUGE),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 5e-324, 1e308, -1e-300, 1e-45]),
    st.text(max_size=12).filter(lambda text: not text.startswith("/")),
    st.deferred(lambda: st.sampled_from([bomb(merging=False), bomb(merging=True)])),
    st.sampled_from(["", "null", "1e3", "3e-4", "0x10", "1_000", "a" * 2000, "{}", "[1]", "${PATH}", "‮", "..", "🦊"]),
    st.dates(),
    st.binary(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(), st.none()), inner, max_size=4),
        st.sets(st.integers(), max_size=3),
    ),
    max_leaves=8,
)


FIELDS = sorted({field.name for kind in CATALOGUE.values() for field in fields(kind)})
policies = st.recursive(
    st.one_of(
        scalars,
        st.tuples(st.sampled_from([*CATALOGUE, "none", "zclipp"]), st.sampled_from(FIELDS), values).map(
            lambda drawn: {"policy": drawn[0], "max_norm": 1.0, drawn[1]: drawn[2]}
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda policies: {"chain": policies}),
        inner.map(lambda policy: {"per_parameter": policy}),
        st.tuples(values, inner).map(lambda two: {"per_group": {"a": {"patterns": two[0], "chain": [two[1]]}}}),
        st.tuples(inner, inner).map(lambda two: {"shadow": {"acting": two[0], "b": two[1]}}),
    ),
    max_leaves=4,
)


def keys_of(task: str) -> list[tuple[str, ...]]:
    """Every section and every key of it that a config of this task may have."""
    known = sections(task)
    below = [tuple(k.split(".")) for name, type_ in known.items() for k, _ in flat(name, type_)]
    return [(name,) for name in known] + below + [("clip", name) for name in (*KINDS, *FIELDS)]


PATHS = {("data", "path"), ("run", "dir"), ("run", "root"), ("name",)}


@st.composite
def mutated(draw: st.DrawFn, document: Document, known: list[tuple[str, ...]], traps: list[str]) -> Document:
    """`document` after one to three changes of keys that are `known`, or of keys that nobody knows."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(known))
        section = document if len(key) == 1 else document.setdefault(key[0], {})
        if not isinstance(section, dict):
            continue
        change = draw(st.sampled_from(["value", "value", "value", "drop", "rename", "nest"]))
        if change == "value":
            at_paths = st.sampled_from(traps) if key in PATHS else st.nothing()
            around = policies.map(lambda policy: [policy]) if key == ("clip", "chain") else policies
            section[key[-1]] = draw(st.one_of(at_paths, values, around if key[-1] in WRAPPERS else st.nothing()))
        elif change == "drop":
            section.pop(key[-1], None)
        elif change == "rename":
            section[
                draw(st.one_of(st.text(max_size=8), st.sampled_from(["class_path", "__proto__", "lr ", "k" * 5000])))
            ] = section.pop(key[-1], None)
        else:
            section[key[-1]] = {"class_path": "os.system", "init_args": {"command": "true"}}
    return document


def spelled(document: Document) -> str:
    return yaml.dump(document, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True)


def bomb(merging: bool) -> str:
    """Nine lines that stand for 9**9 values."""
    first = "a0: &a0 {x: 1}\n" if merging else 'a0: &a0 ["lol"]\n'
    for i in range(9):
        nine = ", ".join([f"*a{i}"] * 9)
        first += f"a{i + 1}: &a{i + 1} {{<<: [{nine}]}}\n" if merging else f"a{i + 1}: &a{i + 1} [{nine}]\n"
    return first


# lines that a hand or an attacker may put anywhere into a config
LINES = [
    *("\t", "\0", "\x85", "\ufeff", "%YAML 9.9", "--- ", "...", "? ", "- ", ": ", "&a", "*a", "!!", "|", ">", "'", '"'),
    *("name: a", "name: b", "seed: 1", "seed: 1\nseed: 2", "? [a, b]\n: c", "? {a: b}\n: c", "<<: {seed: 1}", "<<: 5"),
    *("a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "seed: &s 1\nname: *s", bomb(False), bomb(True)),
    *("seed: !!python/object/apply:os.system ['exit 3']", "seed: !!python/name:os.system", "seed: !!int x"),
    *("seed: !!bool x", "seed: !!float x", "seed: !!timestamp x", "seed: !!binary é", "seed: !!set {a: b}"),
    *("seed: !!omap [1]", "seed: !!map [1]", "seed: !x y", "seed: 2024-99-99", "name: 2024-01-01", "seed: 1:2:3"),
    *(
        "seed: 0x",
        "seed: 0b_",
        "seed: 0x_",
        "seed: ._",
        "seed: " + "9" * 5000,
        "seed: 0x" + "f" * 5000,
        "seed: 1e999999",
    ),
    *(
        "seed: " + "[" * 3000,
        "seed: " + "[" * 3000 + "]" * 3000,
        "seed: " + "{a: " * 500 + "}" * 500,
        "k" * 3000 + ": 1",
    ),
    *("seed: =", "name: ''", "optim: {lr: 1}", "optim: &o {lr: 1}", "data: null", "train: []", "#" * 100, "a: b: c"),
]


@st.composite
def broken(draw: st.DrawFn, text: str) -> bytes:
    """The text of a file with lines put in, cut out or cut short, in one encoding or another."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(0, 2))):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.one_of(st.sampled_from(LINES), st.text(max_size=30))))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = draw(st.sampled_from(["", "  ", "\t"])) + lines[place]
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-16", "latin-1", "utf-8-sig"]))
    raw = "\n".join([*lines, ""]).encode(encoding, "replace")
    how = draw(st.sampled_from(["whole"] * 4 + ["cut", "noise", "big"]))
    if how == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif how == "noise":
        place = draw(st.integers(0, len(raw)))
        raw = raw[:place] + draw(st.binary(max_size=8)) + raw[place:]
    elif how == "big":
        raw += b"# " + b"x" * draw(st.sampled_from([60_000, 2_000_000])) + b"\n"
    return raw
