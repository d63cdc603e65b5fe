"""What calls a Clipper in its user's place goes by the names of distclip/step/__init__.py, and by no private one."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import distclip
import distclip.step

PACKAGE = Path(distclip.step.__file__).parents[1]
EXAMPLE = PACKAGE.parent / "examples/optimizer_that_reduces.py"
FRIENDS = [PACKAGE / "attached.py", *sorted((PACKAGE / "integrations").glob("*.py")), EXAMPLE]
OBJECTS = {  # what friends call ours, and its class: of these the note lists the attributes they use, too
    "engine": "Engine",
    "clipping": "Engine",
    "owner": "Owner",
    "interruption": "Interruption",
    "plan": "Plan",
    "progress": "Progress",
    "outcome": "Outcome",
    "measured": "Measured",
    "stepping": "Stepping",
}


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


@cache
def note() -> set[str]:
    """All names in the note of the seam."""
    quoted = re.findall(r"``(.+?)``", distclip.step.__doc__ or "")
    return {word for text in quoted for word in text.split(".")}


def module(file: Path, node: ast.ImportFrom) -> str:
    """What is imported from, as seen from distclip: "step.engine"; "distclip" itself is empty."""
    if not node.level:
        return (node.module or "").removeprefix("distclip").removeprefix(".")
    folder = file.parents[node.level - 1].relative_to(PACKAGE)
    return ".".join((*folder.parts, *filter(None, (node.module or "",))))


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """The modules and names that a file imports of ours, but for its own folder's."""
    for node in syntax(file):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "distclip"):
            origin = module(file, node)
            if not origin.startswith("integrations"):
                yield from ((origin, alias.name) for alias in node.names)


@cache
def members(name: str) -> set[str]:
    """The public attributes, fields and methods of a class of ours."""
    classes = [node for file in PACKAGE.rglob("*.py") for node in syntax(file) if isinstance(node, ast.ClassDef)]
    found = set()
    for node in (each for kind in classes if kind.name == name for each in ast.walk(kind)):
        match node:
            case ast.FunctionDef(name=member) | ast.AnnAssign(target=ast.Name(id=member)):
                found.add(member)
            case ast.Attribute(value=ast.Name(id="self"), attr=member, ctx=ast.Store()):
                found.add(member)
    assert found, f"no class {name}"
    return {member for member in found if not is_private(member)}


def reached(file: Path) -> Iterator[str]:
    """The attributes of our objects that a file uses, the objects known by what friends call them."""
    for node in syntax(file):
        if isinstance(node, ast.Attribute):
            kind = OBJECTS.get(ast.unparse(node.value).rpartition(".")[2].lstrip("_"))
            if kind is not None and node.attr in members(kind):
                yield node.attr


def unlisted(file: Path) -> list[str]:
    """What a file uses of ours that is neither public nor in the note."""
    names = [name for _, name in imported(file) if name not in vars(distclip)]
    return [f"{file.name} uses {name}" for name in (*names, *reached(file)) if name not in note()]


def test_friends_use_no_private_name_of_ours():
    assert not [name for file in FRIENDS for name in private_names_of_ours(file)]


def test_friends_subclass_nothing():
    assert not [line for file in FRIENDS for line in subclasses(file)]


def test_what_friends_use_is_listed_in_the_note_of_the_seam():
    assert not [line for file in FRIENDS for line in unlisted(file)]


def test_what_the_note_of_the_seam_lists_is_used_by_a_friend():
    modules = {part for file in FRIENDS for origin, _ in imported(file) for part in origin.split(".")}
    names = {name for file in FRIENDS for _, name in (*imported(file), *used(file))}
    assert not note() - modules - names


def test_a_reach_past_the_seam_is_found(tmp_path):
    """The tests above would be green, too, if they found nothing anywhere."""
    file = tmp_path / "friend.py"
    file.write_text(
        "from distclip.optimizers.scaler import _state\nfrom distclip.step.engine import Engine\n"
        "from distclip.plan.verify import verify\nclass Mine(distclip.Clipper): ...\n"
        "clipper._call('step')\ngetattr(clipper, '_driver')\ntheirs._step_of_another_library\n"
        "self._engine.holders\noutcome.measured.runs\nengine.module\n"
    )
    assert private_names_of_ours(file) == ["friend.py:1 _state", "friend.py:5 _call", "friend.py:6 _driver"]
    assert subclasses(file) == ["friend.py: Mine is a Clipper"]
    wrong = {f"friend.py uses {name}" for name in ("_state", "verify", "holders", "measured", "runs")}
    assert set(unlisted(file)) == wrong
