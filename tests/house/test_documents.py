"""Everything shown is run: code in documents, examples, doctests, configs. And every file or test they name is there.

A ```python block runs in a process of its own. A comment right before the block says how, if not simply so:

    <!-- run: 2 ranks -->           as a job of two processes, as torchrun starts them
    <!-- run: test -->              by pytest
    <!-- run: continued -->         after the block before it, in one program
    <!-- run: 2 ranks, continued    two of these, and after some lines that the reader is spared
    import torch
    -->
"""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from house.test_floors import CORE, files, imports
from support.programs import play
from support.ranks import LIMIT

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [file for file in (README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))) if file.exists()]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))  # tests/experiments has those of the folder
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
OPTIONAL = {"accelerate", "deepspeed", "lightning", "peft", "tensorboard", "transformers", "trl"}  # tests do without
IMPORTED = [str(ROOT), str(ROOT / "tests")]  # from where programs import

BLOCK = re.compile(
    r"(?:^<!-- run(?:: (?P<how>[^\n]*?))?(?:\n(?P<unseen>.*?))? ?-->\n)?^```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
TORCHRUN = re.compile(r"torchrun .*?--nproc-per-node[ =](\d+)")
PATH = re.compile(
    r"(?<![\w/.-])((?:launch|configs|examples|docs(?!/_build)|docker|tests|benchmarks|distclip)/[\w./-]*\.[a-z]+)\b"
)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    place: str
    program: str
    ranks: int | None
    is_test: bool


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    program = ""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        place = f"{document.relative_to(ROOT)}:{line}"
        how = [word.strip() for word in (match["how"] or "").split(",") if word.strip()]
        ranks, before = None, ""
        for word in how:
            if word == "continued":
                before = program
            elif found := re.fullmatch(r"(\d+) ranks", word):
                ranks = int(found[1])
            elif word != "test":
                raise ValueError(f"{place}: run: {word!r} is none of 'N ranks', 'test', 'continued'")
        program = before + (match["unseen"] or "") + match["code"]
        yield Block(place, program, ranks, "test" in how)


def written(program: str, folder: Path) -> Path:
    """The program as a file, unless it needs a package that is not here."""
    imported = {part for path in imports("", list(ast.walk(ast.parse(program)))) for part in path}
    missing = sorted(name for name in imported & OPTIONAL if find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    return file


def run(file: Path, ranks: int | None) -> str:
    codes, output = play(file, ranks, IMPORTED, LIMIT)
    assert set(codes) == {0}, f"exit codes {codes}\n{textwrap.indent(output, '  ')}"
    return output


def run_by(launcher: list[str], file: Path) -> str:
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, str(file)],
        cwd=file.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(IMPORTED), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: torchrun ends its ranks before itself
            output = process.communicate()[0] + f"\nstopped after {LIMIT} s"
    assert process.returncode == 0, f"exit code {process.returncode}\n{textwrap.indent(output, '  ')}"
    return output


@pytest.mark.parametrize("block", [b for document in DOCUMENTS for b in blocks(document)], ids=lambda b: b.place)
def test_a_block_of_a_document_runs(block, tmp_path):
    file = written(block.program, tmp_path)
    if block.is_test:
        run_by(["pytest", "-q", "-p", "no:cacheprovider"], file)
    else:
        run(file, block.ranks)


def test_the_readme_shows_code_and_all_of_it_is_seen():
    for document in DOCUMENTS:
        fences = re.findall(r"^ *```(?:python|py)\b", document.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == len(list(blocks(document))), f"{document.name} has a block that no test sees"
    assert not README.exists() or list(blocks(README)), "README.md shows no ```python block"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short_runs_as_it_says_and_shows_something(example, tmp_path):
    program = example.read_text(encoding="utf-8")
    assert program.count("\n") <= 40
    shown = TORCHRUN.search(ast.get_docstring(ast.parse(program)) or "")
    output = run(written(program, tmp_path), int(shown[1]) if shown else None)
    assert output.strip(), "shows nothing"


@pytest.mark.thorough
def test_torchrun_itself_runs_an_example(tmp_path):
    file = written((ROOT / "examples/ddp.py").read_text(encoding="utf-8"), tmp_path)
    assert run_by(["torch.distributed.run", "--standalone", "--nproc-per-node=2"], file).strip()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_config_is_read_by_the_trainer(config):
    from distclip.train.parse import read_config

    read_config(config)


TRITON_CODE = "kernels/triton/device.py"  # imports Triton, has no doctest


def test_the_doctests_of_the_core_hold():
    paths = [Path("distclip", path).with_suffix("") for path, *_ in files(CORE) if path != TRITON_CODE]
    modules = [importlib.import_module(".".join(path.parts).removesuffix(".__init__")) for path in paths]
    results = {module.__name__: doctest.testmod(module) for module in modules}
    assert {name: result for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted for result in results.values()) > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_that_a_document_names_is_there(document):
    text = document.read_text(encoding="utf-8")
    named = {ROOT / path for path in PATH.findall(text)} | {document.parent / path for path in LINK.findall(text)}
    assert {str(path) for path in named if not path.exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_test_that_a_document_names_is_there(document):
    tests = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8"))) <= defined


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("docs/reference/*.md"))
    shown = set(re.findall(r"^\.\. auto\w+:: (?:distclip\.)?(\w+)$", pages, re.MULTILINE))
    tree = ast.parse((ROOT / "distclip/__init__.py").read_text(encoding="utf-8"))
    public = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert public - shown == set()
