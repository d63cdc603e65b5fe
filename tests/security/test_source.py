"""What the source never does: unpickle, run text as code, pass a shell a string, read YAML that makes objects."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("distclip", "launch", "docker", "examples", "benchmarks", "configs")
UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes text into code",
    "__import__": "imports what a text names",
    "os.system": "a shell string",
    "os.popen": "a shell string",
    "subprocess.getoutput": "a shell string",
    "subprocess.getstatusoutput": "a shell string",
    "asyncio.create_subprocess_shell": "a shell string",
    "tempfile.mktemp": "a name that another process can take first",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "yaml.load_all": "may make objects",
}
LOADERS = {"PlainLoader", "SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}
SHELLS = {"sh", "bash", "dash", "zsh", "/bin/sh", "/bin/bash"}


def python_files() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))]


def shell_files() -> list[Path]:
    suffixes = {".sh", ".sbatch"}
    return sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in suffixes)


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `from os import system as s` is {"s": "os.system"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def risks_in(text: str) -> list[str]:
    """Every risky thing in this source, in words."""
    tree = ast.parse(text)
    names = names_of(tree)
    risks = [f"imports {name}" for name in modules_in(tree) if name.split(".")[0] in UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            first, dot, rest = called.partition(".")
            risks += risks_of(names.get(first, first) + dot + rest, node)
        elif isinstance(node, ast.List | ast.Tuple):
            words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            if words and words[0] in SHELLS and "-c" in words:
                risks.append(f"line {node.lineno}: {words[0]} -c, a shell string")
    return risks


def risks_of(called: str, call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    where = f"line {call.lineno}: {called}"
    if called in FORBIDDEN:
        yield f"{where} {FORBIDDEN[called]}"
    if "shell" in given and not is_constant(given["shell"], False):
        yield f"{where} with a shell"
    if called in ("torch.load", "torch.serialization.load") and not is_constant(given.get("weights_only"), True):
        yield f"{where} without weights_only=True"
    if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
        yield f"{where} with pickles"
    if called == "yaml.load":
        loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
        if loader is None or ast.unparse(loader) not in LOADERS:
            yield f"{where} without a safe loader"


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


RISKY = [
    "import pickle",
    "from pickle import loads",
    "import dill as d",
    "import torch\ntorch.load('x')",
    "import torch\ntorch.load('x', weights_only=False)",
    "from torch import load\nload('x')",
    "from torch import load as read\nread('x', weights_only=wanted)",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import yaml\nyaml.load(text, yaml.Loader)",
    "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
    "import yaml\nyaml.unsafe_load(text)",
    "import subprocess as s\ns.run('ls', shell=True)",
    "import subprocess\nsubprocess.run(words, shell=wanted)",
    "import os\nos.system('ls')",
    "from os import system as run\nrun('ls')",
    "import subprocess\nsubprocess.run(['bash', '-c', text])",
    "import tempfile\ntempfile.mktemp()",
    "eval('1')",
    "exec('1')",
]


@pytest.mark.parametrize("text", RISKY, ids=str)
def test_a_risk_is_seen(text):
    assert len(risks_in(text)) == 1


def test_what_is_no_risk_is_none():
    safe = "import torch, yaml, subprocess\ntorch.load('x', weights_only=True)\nyaml.load(t, PlainLoader)\n"
    safe += "subprocess.run(['ls', '-c'])\nmodel.eval()\nre.compile('x')\ntorch.compile(f)"
    assert risks_in(safe) == []


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_source_does_nothing_risky(file):
    assert risks_in(file.read_text(encoding="utf-8")) == []


def test_bandit_finds_nothing():
    pytest.importorskip("bandit")
    command = [sys.executable, "-m", "bandit", "--quiet", "--configfile", "pyproject.toml", "--recursive"]
    done = subprocess.run(
        [*command, "distclip", "launch", "docker", "examples", "hatch_build.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", shell_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_script_evaluates_text(file):
    lines = [line.partition(" # ")[0] for line in file.read_text(encoding="utf-8").splitlines()]
    risky = re.compile(r"^[^#]*(\beval\b|\b(?:ba|da|z)?sh\s+-\w*c\b|curl[^|]*\|\s*\w*sh\b)")
    assert [line for line in lines if risky.search(line)] == []
