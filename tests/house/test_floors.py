"""Imports point down: a file imports from the floors below its own, and the core from torch and Python alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

PACKAGE = Path(__file__).parents[2] / "distclip"
FLOORS = [  # the rule that CONTRIBUTING.md and docs/explanation/design.md refer to, from the ground up
    {"errors", "shield"},
    {"kernels", "report"},
    {"ranks"},
    {"layouts", "policies"},
    {"gradients"},
    {"plan"},
    {"optimizers", "functional"},
    {"step"},
    {"clipper"},
    {"attached"},
    {"__init__"},  # `import distclip`: the public names; the core ends here
    {"telemetry"},
    {"integrations"},
    {"runs"},
    {"reporting"},
    {"train"},
    {"bench"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
INSIDE_INTEGRATIONS = {  # one integration never imports another, but for what it is built on
    ("accelerate.py", "deepspeed"),
    ("deepspeed.py", "deepspeed_optimizers"),
}
MOST_LINES, MOST_METHODS, MOST_UNITS = 300, 14, 22
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
CORE = {unit for unit, floor in FLOOR_OF.items() if floor <= FLOOR_OF["__init__"]}
PICKLES = {name for name in dir(dist) if "_object" in name}  # all_gather_object and its like


def files(units: set[str]) -> Iterator[tuple[str, str, list[ast.AST]]]:
    """Path, unit (the file or folder directly in distclip/) and syntax of every file of these units."""
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        unit = path.parts[0].removesuffix(".py")
        if unit in units:
            yield str(path), unit, list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports(path: str, nodes: list[ast.AST]) -> Iterator[list[str]]:
    """What a file imports, as full paths: `from .plan import Plan` is ["distclip", "plan", "Plan"]."""
    here = ["distclip", *Path(path).parent.parts]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            module = node.module.split(".") if node.module else []
            yield from ([*above, *module, alias.name] for alias in node.names)


def calls(nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
    return ((ast.unparse(node.func), node.lineno) for node in nodes if isinstance(node, ast.Call))


def test_every_file_has_a_floor():
    units = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in PACKAGE.rglob("*.py")}
    assert units - set(FLOOR_OF) == set(), "put it where it belongs in FLOORS"


def test_a_package_says_what_lives_there_and_what_it_may_touch():
    silent = []
    for package in PACKAGE.glob("*/__init__.py"):
        said = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
        if len(said.splitlines()) < 3:
            silent.append(package.parent.name)
    assert not silent


def test_files_and_classes_fit_in_the_eye_and_the_package_in_a_glance():
    large = []
    for path, _, nodes in files(set(FLOOR_OF)):
        lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
        large += [f"{path} has {lines} lines"] if lines > MOST_LINES else []
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, ast.FunctionDef) for each in node.body)
                large += [f"{path} {node.name} has {methods} methods"] if methods > MOST_METHODS else []
    assert not large, "\n".join(large)
    assert len(set(FLOOR_OF) - {"__init__", "__main__"}) <= MOST_UNITS


def test_a_file_imports_only_from_the_floors_below_it():
    upward = []
    for path, unit, nodes in files(set(FLOOR_OF)):
        for first, *rest in imports(path, nodes):
            other = rest[0] if rest and rest[0] in FLOOR_OF else "__init__"
            inside = other == unit and (unit != "integrations" or (Path(path).name, rest[1]) in INSIDE_INTEGRATIONS)
            if first == "distclip" and not inside and FLOOR_OF[other] >= FLOOR_OF[unit]:
                upward.append(f"{path} imports {'.'.join([first, *rest])}")
    assert not upward, "\n".join(upward)


def test_the_core_imports_torch_and_python_alone():
    allowed = {"distclip", "torch"} | sys.stdlib_module_names
    foreign = [
        f"{path} imports {'.'.join(name)}"
        for path, _, nodes in files(CORE)
        for name in imports(path, nodes)
        if name[0] not in allowed and not (name[0] == "triton" and path.startswith("kernels/triton/"))
    ]
    assert not foreign, "\n".join(foreign)


def test_the_core_neither_prints_nor_sets_up_logging():
    loud = [
        f"{path}:{line} {name}"
        for path, _, nodes in files(CORE)
        for name, line in calls(nodes)
        if name == "print" or name.startswith("logging.")
    ]
    assert not loud, "\n".join(loud)


def test_only_named_errors_are_caught():
    broad = [
        f"{path}:{node.lineno}"
        for path, _, nodes in files(set(FLOOR_OF))
        for node in nodes
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or "Exception" in {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)})
    ]
    assert not broad, "\n".join(broad)


def test_nothing_is_pickled_and_no_text_becomes_code():
    risky = []
    for path, _, nodes in files(set(FLOOR_OF)):
        risky += [f"{path} imports pickle" for name in imports(path, nodes) if name[0] == "pickle"]
        risky += [
            f"{path}:{line} {name}"
            for name, line in calls(nodes)
            if name in ("eval", "exec") or name.rpartition(".")[2] in PICKLES
        ]
    assert not risky, "\n".join(risky)
