"""The files of launch/ and docker/ are what their tools ask for, and end in the same line.

That they run is proved elsewhere: test_netns.py beside this file, and the scripts slurm.sh and image.sh.
"""

import copy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.ranks import LIMIT
from train.commands import ROOT

LAUNCH, DOCKER = ROOT / "launch", ROOT / "docker"
SCRIPTS = [
    *sorted(LAUNCH.glob("*.sh")),
    LAUNCH / "slurm.sbatch",
    *sorted(ROOT.glob("docs/*.sh")),
    *sorted(ROOT.glob("tests/**/*.sh")),
    ROOT / ".ci" / "run",
]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCUMENTS = [*sorted(LAUNCH.rglob("*.yaml")), DOCKER / "compose.yaml", *WORKFLOWS]
TRAINJOB, KUSTOMIZATION = LAUNCH / "kubernetes" / "trainjob.yaml", LAUNCH / "kubernetes" / "kustomization.yaml"


def tool(name: str) -> str:
    """The path of a command of the environment that runs the tests, or on the PATH; without it the test is skipped."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def approves(name: str, *words: str | Path, text: str | None = None) -> None:
    """The tool has nothing to say of it."""
    command = [tool(name), *map(str, words)]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=LIMIT, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_shellcheck_approves():
    approves("shellcheck", "--external-sources", *SCRIPTS)


@pytest.mark.parametrize("key", ["setup", "run"])
def test_shellcheck_approves_the_commands_of_skypilot(key):
    commands = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())[key]
    approves("shellcheck", "--shell=bash", "--exclude=SC2153,SC2154", "-", text=commands)  # SkyPilot sets them


def test_no_shell_script_evaluates_text():
    evaluating = re.compile(r"\beval\b|\b(?:ba)?sh -c +[\"$]")
    assert [str(file) for file in SCRIPTS if evaluating.search(file.read_text())] == []


def test_yamllint_approves():
    rules = {"line-length": {"max": 120}, "document-start": "disable", "comments": {"min-spaces-from-content": 1}}
    rules["comments-indentation"] = "disable"  # lines to be uncommented
    rules["truthy"] = {"check-keys": False}  # `on:` of workflows
    approves("yamllint", "--strict", "--config-data", json.dumps({"extends": "default", "rules": rules}), *DOCUMENTS)


@pytest.mark.skipif(not WORKFLOWS, reason="a source archive has none")
def test_the_workflows_fit_their_schema_and_zizmor_approves():
    approves("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    approves("zizmor", "--offline", "--quiet", *WORKFLOWS)  # pinned actions, least permissions, no injected text


def test_hadolint_approves():
    approves("hadolint", DOCKER / "Dockerfile")


def test_the_compose_file_fits_its_schema():
    approves("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


def test_two_services_of_the_compose_file_meet():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    host, _, port = services["node0"]["environment"]["RDZV_ENDPOINT"].partition(":")
    assert (len(services), host in services, port.isdigit()) == (2, True, True)
    assert all(int(service["environment"]["NNODES"]) == len(services) for service in services.values())


def health() -> int:
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(DOCKER / "health.py"))
    return int(end.value.code or 0)


def test_the_health_check_holds_and_can_fail(capsys, monkeypatch):
    assert health() == 0
    assert capsys.readouterr().out == "norm 6.082763 clipped to 1.000000: sound\n"
    monkeypatch.setattr("distclip.clip_grad_norm_", lambda parameters, max_norm: next(parameters).norm())
    assert health() == 1


def test_the_image_is_pinned_and_not_root():
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert re.fullmatch(r"ARG BASE_IMAGE=python:\d+\.\d+\.\d+-[\w-]+", next(w for w in lines if w.startswith("ARG")))
    assert [w for w in lines if w.startswith("FROM")] == ["FROM ${BASE_IMAGE} AS build", "FROM ${BASE_IMAGE}"]
    assert [w for w in lines if w.startswith("USER")] == ["USER 10001:10001"]
    pinned = [w for w in (DOCKER / "requirements.txt").read_text().splitlines() if w and w[0] != "#"]
    assert [w for w in pinned if not re.fullmatch(r"[\w\[\]-]+==[\d.]+", w)] == ["torch"]  # by constraints.txt
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = [re.split(r"[>=<]", line)[0] for line in asked]
    assert {name.lower() for name in names} <= {line.split("==")[0].lower() for line in pinned}


def without_nothing(value: Any) -> Any:
    """As the API's models write it back: a key without a value is no key."""
    if isinstance(value, dict):
        return {key: without_nothing(item) for key, item in value.items() if item is not None}
    return [without_nothing(item) for item in value] if isinstance(value, list) else value


def unknown(job: dict[str, Any]) -> list[str]:
    """What of a TrainJob the models of Kubeflow's API do not know: they drop it without a word."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    known = json.loads(models.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job)).to_json())
    return list(differences(without_nothing(job), without_nothing(known), "job"))


def differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from differences(ours.get(key), theirs.get(key), f"{where}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif ours != theirs:
        yield where


def patched() -> dict[str, Any]:
    """The job with the patches of kustomization.yaml, as kustomize applies them (RFC 6902: add and replace)."""
    job: dict[str, Any] = yaml.safe_load(TRAINJOB.read_text())
    (patch,) = yaml.safe_load(KUSTOMIZATION.read_text())["patches"]
    for change in yaml.safe_load(patch["patch"]):
        *path, last = change["path"].strip("/").split("/")
        place: Any = job
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place[key]
        key = int(last) if isinstance(place, list) else last
        assert change["op"] == "replace", f"this test cannot {change['op']}"
        place[key]  # what is replaced is there
        place[key] = change["value"]
    return job


def test_the_trainjob_is_one_of_kubeflow_trainer_v2():
    job = yaml.safe_load(TRAINJOB.read_text())
    assert (job["apiVersion"], job["spec"]["runtimeRef"]) == (
        "trainer.kubeflow.org/v1alpha1",
        {"name": "torch-distributed"},
    )
    assert unknown(job) == []
    assert unknown(patched()) == []


def test_a_wrong_trainjob_is_found():
    job = patched()
    job["spec"]["trainer"]["numNode"] = 2
    assert unknown(job) == ["job.spec.trainer.numNode"]
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        unknown(job)


def test_kustomize_renders_the_patched_job():
    command = [tool("kubectl"), "kustomize", str(KUSTOMIZATION.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert yaml.safe_load(result.stdout) == patched()


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", "kubernetes/trainjob.yaml", "skypilot.yaml"])
def test_every_launcher_ends_in_multinode(name):
    assert "multinode.sh" in (LAUNCH / name).read_text()


def test_multinode_ends_in_distclip_train():
    assert (LAUNCH / "multinode.sh").read_text().endswith('\n    -m distclip train "$config" "${words[@]}"\n')
    assert '"-m", "distclip", "train", *' in (LAUNCH / "ray_train.py").read_text()


TWO = {"RDZV_ENDPOINT": "127.0.0.1:29500", "NNODES": "2"}


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        ([], TWO, "which config?"),
        (["configs/none.yaml"], TWO, "there is no config configs/none.yaml"),
        (["configs/quickstart.yaml"], {}, "where do the machines meet? RDZV_ENDPOINT"),
        (["configs/quickstart.yaml"], {"RDZV_ENDPOINT": "127.0.0.1"}, "is not host:port"),
        (["configs/quickstart.yaml"], {"RDZV_ENDPOINT": "$(touch x):1"}, "is not host:port"),
        (["configs/quickstart.yaml"], {"RDZV_ENDPOINT": "127.0.0.1:1"}, "how many machines? NNODES=2"),
        (["configs/quickstart.yaml"], TWO | {"NNODES": "two"}, "how many machines? NNODES=2"),
        (["configs/quickstart.yaml"], TWO | {"DEADLINE": "soon"}, "DEADLINE=soon is no time"),
        (["configs/quickstart.yaml"], TWO | {"JOIN_TIMEOUT": "-1"}, "JOIN_TIMEOUT=-1 is no whole number"),
        (["configs/quickstart.yaml"], TWO | {"JOB": "../x"}, "JOB=../x names a folder"),
        (["configs/quickstart.yaml"], TWO | {"JOB": ".."}, "JOB=.. names a folder"),
        (["configs/quickstart.yaml"], TWO | {"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE=all is neither"),
        (["configs/quickstart.yaml"], TWO | {"MAX_RESTARTS": "yes"}, "MAX_RESTARTS=yes is no number"),
        (["configs/quickstart.yaml"], TWO | {"PYTHON": "false"}, "false has no distclip[train]"),
        (["configs/quickstart.yaml", "clip.max_nom=1"], TWO, "did you mean clip.max_norm?"),
        (["configs/quickstart.yaml"], {"PET_MASTER_ADDR": "x", "PET_NNODES": "2"}, "PET_NODE_RANK is not"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_missing_or_wrong_is_said_in_one_line(words, settings, said):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "RDZV", "NNODES"))}
    result = subprocess.run(
        ["bash", str(LAUNCH / "multinode.sh"), *words],
        cwd=ROOT,
        env=clean | {"PYTHON": sys.executable} | settings,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode in (1, 2)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
