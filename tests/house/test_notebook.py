"""The notebook runs from top to bottom, says what its text says, and is kept as it ran."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from house.test_documents import IMPORTED, ROOT
from support.programs import play
from support.ranks import LIMIT

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
UNSEEN = "import matplotlib.pyplot as plt\nplt.switch_backend('agg')\nplt.show = lambda: None\n"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_runs_and_its_text_is_true(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "program.py"
    file.write_text(UNSEEN + "\n".join(map(source, cells("code"))), encoding="utf-8")
    codes, output = play(file, None, IMPORTED, LIMIT)
    assert codes == [0], output
    assert "column makes 99" in output, "the report names the layer"
    assert "3 spikes in 300 steps" in output
    assert "A bound to begin with: max_norm=" in output
    assert "clipped 3 of 300 steps" in output
    for free, clipped in re.findall(r"free (\d\.\d+), clipped (\d\.\d+)", output):
        assert float(clipped) < float(free)


def test_it_is_kept_as_it_ran():
    ran = cells("code")
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert NOTEBOOK.stat().st_size < 300_000


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", "\n".join(map(source, cells("markdown"))))
    assert links
    assert [link for link in links if not Path(NOTEBOOK.parent, link).exists()] == []
