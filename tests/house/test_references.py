"""What docstrings, comments and tables refer to is there: names of ours by their role, files, and mutated files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mutation.mutate import TARGETS

ROOT = Path(__file__).parents[2]
FOLDERS = ("distclip", "tests", "benchmarks", "examples", "launch", "docker")
SOURCES = sorted([*(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")), *ROOT.glob("docs/*.py")])
SHELL = [*(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.sh")), *ROOT.glob("docs/*.sh")]
SCRIPTS = [*ROOT.glob("*.py"), *SHELL]
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`([^`]*)`")
FILE = re.compile(r"(?<![\w*./-])[\w./-]*\w\.(?:py|sh)\b")
MADE_BY_TESTS = {"program.py", "friend.py"}


def names_of(file: Path) -> Iterator[str]:
    """Those of a file: its module and package, functions, classes, variables and attributes."""
    yield from file.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def lost(text: str, names: set[str], paths: set[str]) -> list[str]:
    """What ``text`` refers to, by name or by path, that is not there."""
    roles = [role for role in ROLE.findall(text) if not set(role.strip(".").split(".")) <= names]
    files = [file for file in FILE.findall(text) if file not in MADE_BY_TESTS]
    return roles + [file for file in files if not any(f"/{path}".endswith(f"/{file}") for path in paths)]


def test_what_sources_refer_to_is_there():
    names = {name for file in SOURCES for name in names_of(file)}
    paths = {str(file.relative_to(ROOT)) for file in SOURCES + SCRIPTS}
    found = {file: lost(file.read_text(encoding="utf-8"), names, paths) for file in SOURCES if file != Path(__file__)}
    assert not {str(file.relative_to(ROOT)): gone for file, gone in found.items() if gone}


def test_a_reference_that_is_lost_is_found():
    text = "See :meth:`.engine.Engine.stride`, `gone.py` and :class:`Engine` in engine.py."
    assert lost(text, {"engine", "Engine"}, {"step/engine.py"}) == [".engine.Engine.stride", "gone.py"]


def test_what_is_mutated_and_what_must_notice_are_there():
    noticing = {f"tests/{test}" for tests in TARGETS.values() for test in tests}
    assert not [path for path in {*TARGETS, *noticing} if not (ROOT / path).is_file()]
