"""Each check by itself: what it finds where all is well, and what it says where something is not."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distclip.bench.place import Place
from distclip.doctor import collectives, gpu, layouts, machine, model, speed, subjects
from distclip.doctor.examination import attempt, hold, trouble
from distclip.doctor.finding import Check, Finding, Unfit, Unusable
from distclip.doctor.meeting import Meeting
from distclip.doctor.page import Page, rows
from distclip.doctor.place import Site
from support.accelerator import EXISTS
from support.ranks import run_ranks

CPU = torch.device("cpu")


def site(timeout: float = 30.0) -> Site:
    return Site(place=Place.here(CPU), timeout=timeout)


# ---- versions and kernels ----------------------------------------------------------------------------------


def facts(**other) -> dict:
    return machine.facts(CPU) | other


def test_ranks_that_run_the_same_are_well():
    found = machine.judge_versions("versions", [facts(), facts()])
    assert found.state == "ok"
    assert f"torch {torch.__version__}" in found.text
    assert len(found.more) == 1
    assert found.more[0].startswith("ranks 0, 1 on ")


@pytest.mark.parametrize("key", ["torch", "distclip", "python", "device"])
def test_a_rank_that_runs_another_version_is_named(key):
    found = machine.judge_versions("versions", [facts(**{key: "1.0"}), facts(), facts()])
    assert found.wrong
    assert found.ends
    assert found.text.startswith(f"rank 0: {machine.SAME[key]} 1.0, the others have ")


def test_gpus_that_are_fewer_than_ranks_are_mentioned():
    assert "1 GPU not used" in machine.judge_versions("versions", [facts(gpus=1)]).more[0]


def test_kernels_that_are_not_used_say_why():
    slow = facts(**{"host kernel": "torch's kernels", "why not compiled": "no C compiler: install gcc"})
    found = machine.judge_kernels("kernels", [slow, slow])
    assert "torch's kernels (no C compiler: install gcc)" in found.text
    assert "Triton: not used (" in found.text
    found = machine.judge_kernels("kernels", [facts(**{"why not compiled": ""}), slow])
    assert found.text.startswith("rank 0: ")
    assert found.more[0].startswith("rank 1: sums on the CPU: torch's kernels")


def test_why_there_is_no_compiled_kernel(monkeypatch):
    monkeypatch.setattr("distclip.kernels.native.kernel", None)
    monkeypatch.delenv("CC", raising=False)
    assert "install it again" in machine.why_not_compiled() or "no C compiler" in machine.why_not_compiled()
    monkeypatch.setenv("PATH", "")
    assert machine.why_not_compiled().startswith("no C compiler")
    monkeypatch.setenv("DISTCLIP_NATIVE", "0")
    assert machine.why_not_compiled() == "DISTCLIP_NATIVE=0 says so"


# ---- collectives -------------------------------------------------------------------------------------------


def tried(broken: bool) -> dict:
    right = dist.all_reduce
    if broken and dist.get_rank() == 1:
        dist.all_reduce = lambda tensor, *args, **kwargs: right(tensor, *args, **kwargs) or tensor.add_(1)
    try:
        return collectives.run(site())
    finally:
        dist.all_reduce = right


def test_a_backend_that_adds_rightly_is_well():
    found = collectives.judge("collectives", run_ranks(tried, 3, False))
    assert (found.state, found.text.count(",")) == ("ok", len(collectives.COLLECTIVES) - 1)


def test_a_backend_that_adds_wrongly_on_one_rank_is_named():
    found = collectives.judge("collectives", run_ranks(tried, 2, True))
    assert found.wrong
    assert found.ends
    assert "rank 1: all_reduce of float64 gave [3.0, 2.0], not [2.0, 1.0]" in found.text


def timed() -> dict:
    return collectives.latency(site())


def test_latency_is_that_of_the_slowest_rank():
    records = run_ranks(timed, 2)
    found = collectives.judge_latency("latency", records)
    assert found.facts["all_reduce_ms"]["2"] == max(record["2"] for record in records) > 0


# ---- layouts -----------------------------------------------------------------------------------------------


def every_layout() -> dict[str, dict]:
    return {check.name: attempt(check.run) for check in layouts.checks(site())}


LEFT_OUT = {
    1: {"FSDP1", "HSDP", "FSDP2 x TP", "pipeline stages"},
    3: {"HSDP", "FSDP2 x TP", "pipeline stages"},
    4: set(),
}


@pytest.mark.parametrize("size", LEFT_OUT)
def test_the_norm_is_right_on_every_layout(size):
    records = run_ranks(every_layout, size)
    left_out = set()
    for name in subjects.LAYOUTS:
        mine = [record[name] for record in records]
        found = trouble(name, mine, 1.0) or layouts.judge(name, mine)
        assert not found.wrong, found
        left_out |= {name} if found.state == "left out" else set()
    assert left_out == LEFT_OUT[size]


def record(ours: float = 2.0, oracle: float = 2.0, after: float = 1.0, torchs: float | str = 2.0) -> dict:
    return {"ours": ours.hex(), "oracle": oracle, "after": after, "torch": torchs}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([record(), record(ours=2.0 + 2**-50)], "the norm has other bits on each rank: 2 on rank 0; 2 on rank 1"),
        ([record(oracle=3.0)] * 2, "the norm is 2, and in one process 3"),
        ([record(after=1.1)] * 2, "clipped to 1, gradients have the norm 1.1"),
    ],
)
def test_a_wrong_norm_is_named(records, said):
    found = layouts.judge("DDP", records)
    assert (found.state, found.text) == ("wrong", said)


@pytest.mark.parametrize(
    ("torchs", "shown"),
    [
        ([2.0, 2.0], "right"),
        ([1.5, 1.5], "wrong: 1.5"),
        ([1.5, 1.25], "wrong: 1.25 to 1.5, by rank"),
        ([2.0, "raises RuntimeError: " + 60 * "x"], "raises RuntimeError: xxxxxxxxxxxxxxxxxxxx..."),
    ],
)
def test_what_torch_says_stands_beside_it(torchs, shown):
    found = layouts.judge("DDP", [record(torchs=each) for each in torchs])
    assert (found.state, found.columns) == ("ok", ("2", "2", shown))


# ---- speed and GPUs ----------------------------------------------------------------------------------------


def timed_steps() -> dict:
    return speed.run(50_000, site())


def test_steps_are_timed_on_the_slowest_rank(monkeypatch):
    records = run_ranks(timed_steps, 2)
    found = speed.judge("speed", records)
    assert records[0]["rounds"] == records[1]["rounds"] >= speed.FEWEST
    assert found.facts["clipped"] == max(each["clipped"] for each in records) > 0
    assert "0.0" in found.text
    assert "with clipping" in found.text


@pytest.mark.parametrize("parameters", [1, 10_000, 4_000_000, 7_000_000_000])
def test_the_timed_model_has_about_the_size_that_is_asked_for(parameters):
    layers, width = speed.sizes(parameters)
    assert width % 16 == 0
    assert width <= speed.WIDEST
    if parameters >= 1_000_000:
        assert 12 * layers * width**2 == pytest.approx(parameters, rel=0.2)


def on_a_simulated_gpu(fault: str) -> dict:
    from gpu.chip import NotThere
    from support.accelerator import Wait

    chip, place = NotThere("default"), Place.here(CPU)
    there = Site(place=replace(place, device=chip.device), timeout=30.0)
    plain = gpu.Clipper.step
    with pytest.MonkeyPatch.context() as patch:
        if fault == "waits":  # a step that reads its norm
            patch.setattr(gpu.Clipper, "step", lambda clipper, *them: plain(clipper, *them).to_dict() and None)
        elif fault == "norms":
            patch.setattr(gpu, "NEAR", 0.0)
        assert Wait in chip.errors
        return attempt(partial(gpu.run, there, chip))


@pytest.mark.skipif(not EXISTS, reason="this torch has no backends in Python")
@pytest.mark.parametrize("fault", ["", "waits", "norms"])
def test_a_device_is_right_waits_for_nothing_and_captures(fault):
    records = run_ranks(on_a_simulated_gpu, 2, fault, fresh=True)
    found = trouble("GPU", records, 9.0) or gpu.judge("GPU", records)
    assert found.state == ("wrong" if fault else "ok"), found
    said = {"": "right: norms, no waits, CUDA graphs", "waits": "a step waits for the device", "norms": "in float64"}
    assert said[fault] in found.text


# ---- one check on all ranks --------------------------------------------------------------------------------


def raising(error: Exception):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "record"),
    [
        (Unfit("needs 4 ranks"), {"unfit": "needs 4 ranks"}),
        (Unusable("no model"), {"error": "no model", "kind": "unusable"}),
        (KeyError("x\n  y"), {"error": "KeyError: 'x\\n y'", "kind": "own"}),
        (dist.DistBackendError("NCCL is down"), {"error": "NCCL is down", "kind": "backend"}),
        (
            RuntimeError("[gloo/x.cc] closed This is typically caused by"),
            {"error": "[gloo/x.cc] closed", "kind": "backend"},
        ),
    ],
)
def test_why_a_rank_failed_is_told(error, record):
    assert attempt(raising(error)) == record


def own(text: str) -> dict:
    return {"error": text, "kind": "own"}


BACKEND = {"error": "gloo: closed", "kind": "backend"}


@pytest.mark.parametrize(
    ("records", "text", "ends", "code"),
    [
        ([own("E: a"), own("E: a")], "E: a", False, 1),
        ([own("E: a"), own("E: b")], "rank 0: E: a; rank 1: E: b", False, 1),
        ([{}, own("E: a")], "rank 1: E: a", True, 1),
        ([BACKEND, own("E: a")], "rank 1: E: a", True, 1),
        ([BACKEND, None], "rank 1 does not answer within 4 s: dead or stuck, see what was printed there", True, 1),
        ([BACKEND, BACKEND], "gloo: closed", True, 1),
        ([{}, None], "rank 1 does not answer within 9 s: dead or stuck, see what was printed there", True, 1),
        ([{}, {"error": "no model", "kind": "unusable"}], "rank 1: no model", True, 2),
    ],
)
def test_what_went_wrong_on_a_rank_is_named(records, text, ends, code):
    found = trouble("check", records, 9.0)
    assert found.wrong
    assert found.text.startswith(text)
    assert (found.ends, found.code) == (ends, code)


def held(rank_0_dies: bool) -> list[dict]:
    """Two checks of which rank 1 fails the second."""
    with pytest.MonkeyPatch.context() as patch:
        return held_with(patch, rank_0_dies)


def held_with(patch: pytest.MonkeyPatch, rank_0_dies: bool) -> list[dict]:
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    meeting = Meeting(store=store, rank=dist.get_rank(), world=dist.get_world_size(), timeout=1.0)
    run = raising(ValueError("no")) if meeting.rank == 1 else dict
    if rank_0_dies:
        if meeting.rank == 0:
            return []
        patch.setattr("distclip.doctor.meeting.GRACE", 0.1)
        meeting = replace(meeting, timeout=0.1)
    checks = [Check(name="good", run=dict, judge=lambda name, records: Finding(name=name, text=str(len(records))))]
    checks += [Check(name="bad", run=run, judge=lambda name, records: Finding(name=name))]
    return [hold(meeting, check).to_dict() for check in checks]


def test_every_rank_learns_what_rank_0_concludes():
    first, *others = run_ranks(held, 3, False)
    assert first[0]["text"] == "3"
    assert first[1]["text"] == "rank 1: ValueError: no"
    assert json.dumps(others) == json.dumps([first, first])  # as it travels


def test_a_rank_0_that_does_not_answer_is_named():
    _, found = run_ranks(held, 2, True)
    assert [each["text"].partition(" within")[0] for each in found] == 2 * ["rank 0 does not answer"]


# ---- the user's model --------------------------------------------------------------------------------------


def tried_model(name: str) -> dict:
    return attempt(model.check(f"doctor.mine:{name}", 20.0, verifies=True, every=False).run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("another_on_rank_1", "rank 1: 4 parameters of 75 elements"),
        ("unreduced", "ranks that should hold the same gradient do not: 0.weight"),
        ("raises_on_rank_1", "rank 1: RuntimeError: backward() of --model raised KeyError: 'batch' at"),
        ("a_number", "--model: doctor.mine:a_number() returned int, not a module"),
    ],
)
def test_a_model_that_is_wrong_is_named(name, said):
    found = trouble("your model", run_ranks(tried_model, 2, name, fresh=True), 20.0)
    assert found.wrong
    assert said in found.text
    assert found.code == (2 if name == "a_number" else 1)


@pytest.mark.parametrize("name", ["sharded", "stages", "without_backward"])
def test_a_model_that_is_right_is_verified_and_inspected(name):
    records = run_ranks(tried_model, 2, name)
    assert trouble("your model", records, 20.0) is None
    found = model.judge("your model", records, every=True)
    assert found.state == "ok"
    assert found.text == model.UNVERIFIED if name == "without_backward" else found.text.startswith("verified")


# ---- what is printed ---------------------------------------------------------------------------------------


def test_a_finding_is_a_line_and_layouts_a_table():
    assert rows(Finding(name="versions", text="same", more=["a", ""]), False) == [
        "ok     versions         same",
        "                        a",
        "                        ",
    ]
    lines = rows(Finding(name="DDP", columns=("2", "2", "right")), False)
    assert lines[1].split() == ["layout", "one", "process", "distclip", "torch.nn.utils.clip_grad_norm_"]
    assert lines[2].split() == ["ok", "DDP", "2", "2", "right"]
    assert rows(Finding(name="DDP", columns=("2", "3", "right"), state="wrong", text="no"), True)[-1] == "       no"


def test_a_terminal_shows_what_is_being_done(capsys, monkeypatch):
    page = Page(None)
    page.begin("FSDP2")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    page.begin("FSDP2")
    assert "... FSDP2" in capsys.readouterr().err
    page.add(Finding(name="FSDP2", columns=("2", "2", "right")))
    assert capsys.readouterr().err.endswith("\033[K")  # wiped


def test_json_on_the_standard_output_is_alone_there(capsys):
    page = Page(Path("-"))
    page.add(Finding(name="versions", text="same"))
    page.add(Finding(name="speed", state="wrong", text="slow"))
    page.end(concludes=True)
    output, errors = capsys.readouterr()
    assert errors.splitlines()[-1].startswith("Wrong: speed (2 checks in 0.0 s)")
    assert [each["name"] for each in json.loads(output)["findings"]] == ["versions", "speed"]
    assert not json.loads(output)["ok"]
