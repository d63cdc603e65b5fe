"""What calls a Clipper in its user's place goes by the names of distclip/step/__init__.py, and by no private one."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import distclip.step

PACKAGE = Path(distclip.step.__file__).parents[1]
EXAMPLE = PACKAGE.parent / "examples/optimizer_that_reduces.py"
FRIENDS = [PACKAGE / "attached.py", *sorted((PACKAGE / "integrations").glob("*.py")), EXAMPLE]
ROOMS = ("gradients", "optimizers", "plan", "ranks", "step")  # of which the note of the seam lists what friends use


@cache
def syntax(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def defined(file: Path) -> set[str]:
    """The private names that a file gives: to functions, classes, variables and attributes."""
    names = set()
    for node in syntax(file):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return set(filter(is_private, names))


def used(file: Path) -> Iterator[tuple[int, str]]:
    """Where a file uses which names: as attributes, but for those of ``self``, by ``getattr`` or by an import of ours.

    As no friend subclasses what is ours, ``self`` has its own names and those of the framework.
    """
    for node in syntax(file):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            yield from ((arg.lineno, str(arg.value)) for arg in node.args[1:2] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("distclip")):
            yield from ((node.lineno, alias.name) for alias in node.names)


def private_names_of_ours(file: Path) -> list[str]:
    ours = {name for other in PACKAGE.rglob("*.py") if other != file for name in defined(other)} - defined(file)
    return [f"{file.name}:{line} {name}" for line, name in sorted(used(file)) if name in ours]


def subclasses(file: Path) -> list[str]:
    classes = [node for node in syntax(file) if isinstance(node, ast.ClassDef)]
    bases = {(node.name, ast.unparse(base).rpartition(".")[2]) for node in classes for base in node.bases}
    return [f"{file.name}: {name} is a {base}" for name, base in bases if base in ("Clipper", "Engine")]


def unlisted(file: Path) -> list[str]:
    """What a file imports of the rooms above, and the note does not name."""
    imports = [node for node in syntax(file) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.level or (node.module or "").startswith("distclip.")]
    found = [(room, alias.name) for node in ours for room in (node.module or "").split(".") for alias in node.names]
    note = distclip.step.__doc__ or ""
    return [f"{file.name} imports {name}" for room, name in found if room in ROOMS and f"{name}``" not in note]


def test_friends_use_no_private_name_of_ours():
    assert not [name for file in FRIENDS for name in private_names_of_ours(file)]


def test_friends_subclass_nothing():
    assert not [line for file in FRIENDS for line in subclasses(file)]


def test_what_friends_import_is_listed_in_the_note_of_the_seam():
    assert not [line for file in FRIENDS for line in unlisted(file)]


def test_a_reach_past_the_seam_is_found(tmp_path):
    """The three tests above would be green, too, if they found nothing anywhere."""
    file = tmp_path / "friend.py"
    file.write_text(
        "from distclip.optimizers.scaler import _state\nfrom distclip.step.engine import Engine\n"
        "from distclip.plan.verify import verify\nclass Mine(distclip.Clipper): ...\n"
        "clipper._call('step')\ngetattr(clipper, '_driver')\ntheirs._step_of_another_library\n"
    )
    assert private_names_of_ours(file) == ["friend.py:1 _state", "friend.py:5 _call", "friend.py:6 _driver"]
    assert subclasses(file) == ["friend.py: Mine is a Clipper"]
    assert unlisted(file) == ["friend.py imports _state", "friend.py imports verify"]
