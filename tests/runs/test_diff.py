"""distclip diff: real pairs of runs, and where and in what they part."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distclip import AutoClip, Clipper
from distclip.cli import main
from distclip.telemetry import JsonLines, Log
from runs.test_formats import lines
from support import older_torch
from support.ranks import run_ranks

SHAPES = {"a": (7, 5), "b": (11,), "c": (4, 3)}
STEPS = 60


def drawn(seed: int, step: int) -> dict[str, Tensor]:
    """What is added to each gradient in a step, the same on any number of ranks."""
    chance = torch.Generator().manual_seed(1000 * seed + step)
    return {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


def cut(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Over the ranks, which all have the whole."""
    return older_torch.cut(whole, mesh, [Shard(0)])


def train(path: Path, seed: int = 0, first: int = 0, flip: int | None = None, every: int | None = 1) -> None:
    """A training whose gradients depend on the weights by operations that round alike wherever an element is.

    ``first``: steps that a run before has made, whose weights and state it goes on with. ``flip``: the step in which
    one bit of an element of the gradient of b flips.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = {name: cut(each, mesh) for name, each in drawn(seed, -1).items()}
    model = nn.ParameterDict({name: nn.Parameter(each) for name, each in values.items()})
    watch = None if every else "parameters"
    policy = AutoClip(percentile=40, window=9) if every else 1.0
    clipper = Clipper(model, policy, exact=bool(every), watch=watch, fingerprint_every=every)
    log = None if first else Log(clipper, JsonLines(path), every=1)
    for step in range(1, STEPS + 1):
        if step == first + 1 and first:  # as if all before had been made by another process
            state = clipper.state_dict()
            clipper = Clipper(model, policy, exact=bool(every), watch=watch, fingerprint_every=every)
            clipper.load_state_dict(state)
            log = Log(clipper, JsonLines(path), every=1)
        advance(model, clipper, drawn(seed, step), step == flip)
    assert log is not None
    log.close()


@torch.no_grad()
def advance(model: nn.ParameterDict, clipper: Clipper, noise: dict[str, Tensor], flip: bool) -> None:
    for name, p in model.items():
        p.grad = p.detach() * 0.5 + cut(noise[name], p.device_mesh)
    if flip and dist.get_rank() == 0:
        model["b"].grad.to_local().view(torch.int32)[3] ^= 1 << 12
    if not clipper.clip_().skip:
        for p in model.values():
            p.sub_(p.grad * 0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Runs on two ranks, and on one where that is no matter."""
    folder = tmp_path_factory.mktemp("pairs")
    runs = {
        "straight": {},
        "again": {},
        "resumed": {"first": 20},
        "flipped": {"flip": 37},
    }
    alone = {
        "alone": {},
        "flipped_between": {"flip": 37, "every": 10},
        "reseeded": {"seed": 1},
        "watched": {"every": None},
        "watched_flipped": {"every": None, "flip": 37},
    }
    for name, how in (runs | alone).items():
        run_ranks(called, 2 if name in runs else 1, folder / f"{name}.jsonl", how)
    return SimpleNamespace(**{path.stem: str(path) for path in folder.iterdir()})


def called(path: Path, how: dict) -> None:
    train(path, **how)


def diff(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["diff", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def document(capsys, *words: str) -> dict:
    code, out, _ = diff(capsys, *words, "--json")
    found = json.loads(out)
    assert code == (0 if found["same"] else 1)
    return found


@pytest.mark.parametrize("other", ["again", "alone"])
def test_the_same_seed_and_another_number_of_ranks_are_the_same(capsys, made, other):
    code, out, _ = diff(capsys, made.straight, getattr(made, other))
    assert code == 0
    assert "60 steps, 1 to 60" in out
    assert "fingerprints in 60 of them" in out
    assert out.endswith("the same\n")


def test_a_run_that_went_on_at_20_is_the_same_from_there(capsys, made):
    code, out, _ = diff(capsys, made.straight, made.resumed)
    assert code == 0
    assert "40 steps, 21 to 60" in out
    assert "20 steps that only A has" in out


def test_one_flipped_bit_is_found_in_its_step_and_parameter(capsys, made):
    found = document(capsys, made.straight, made.flipped)["parting"]
    assert (found["step"], found["parameters_step"]) == (37, 37)
    assert (found["parameters"], found["of"], found["by"]) == (["b"], 3, "fingerprint")
    assert set(found["columns"]) >= {"fingerprint"}
    drift = found["drifts"]["norm"]
    assert list(map(int, drift["by_step"])) == [37, 38, 47, 60]
    assert 0 < drift["largest"] < 1e-2
    code, out, _ = diff(capsys, made.straight, made.flipped)
    assert code == 1
    assert "they part at step 37" in out
    assert "parameters that differ, by the fingerprints: b (1 of 3)" in out


def test_fingerprints_of_some_steps_tell_later_than_the_norm(capsys, made):
    found = document(capsys, made.straight, made.flipped_between)
    assert found["prints"] == 6
    assert found["parting"]["parameters_step"] == 40
    assert found["parting"]["step"] in (37, 38, 39)  # a norm in float32 may round the flip away
    assert "b" in found["parting"]["parameters"]


def test_norms_of_layers_tell_where_there_are_no_fingerprints(capsys, made):
    found = document(capsys, made.watched, made.watched_flipped)["parting"]
    assert (found["step"], found["parameters"], found["by"]) == (37, ["b"], "norm")


def test_another_seed_parts_at_step_1(capsys, made):
    code, out, _ = diff(capsys, made.straight, made.reseeded)
    assert code == 1
    assert "they part at step 1" in out
    assert "parameters that differ, by the fingerprints: all 3" in out


def records(steps: Sequence[int], **columns: object) -> list[dict]:
    return [{"step": step, "norm": 1.0, **columns} for step in steps]


def test_what_cannot_be_compared_is_said_in_a_line(capsys, tmp_path):
    early, late = lines(tmp_path / "a.jsonl", records([1, 2])), lines(tmp_path / "b.jsonl", records([5]))
    plain = lines(tmp_path / "c.jsonl", [{"step": 1, "speed": 2.0}])
    for words, reason in (
        ((early, late), f"the runs have no step in common: {early} has steps 1 to 2, {late} has steps 5 to 5"),
        ((early, tmp_path / "none"), "there is no such file or folder"),
        ((early, plain), "no column is known as a gradient norm"),
        ((early, tmp_path), "holds several logs"),
        ((early, late, "--norm", "speed"), "no column is called 'speed'"),
    ):
        code, out, err = diff(capsys, *map(str, words))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert reason in err


def test_the_drift_of_the_largest_numbers_is_a_number(capsys, tmp_path):
    one, other = (str(lines(tmp_path / f"{k}.jsonl", records([1], loss=k * 1.7e308))) for k in (1, -1))
    assert document(capsys, one, other)["parting"]["drifts"]["loss"]["largest"] == 2.0


def test_one_step_that_only_one_run_has_is_one_step(capsys, tmp_path):
    one, other = lines(tmp_path / "a.jsonl", records([1, 2])), lines(tmp_path / "b.jsonl", records([2]))
    assert "left out: 1 step that only A has" in diff(capsys, str(one), str(other))[1]


def test_a_layer_whose_name_has_a_line_break_is_compared_and_named_in_one_line(capsys, tmp_path):
    one, other = (str(lines(tmp_path / f"{k}.jsonl", records([1], **{"norm/a\nb": k}))) for k in (1, 2))
    assert document(capsys, one, other)["parting"]["parameters"] == ["a\nb"]
    assert "by the norms: a\\nb (1 of 1)\n" in diff(capsys, one, other)[1]


def test_numbers_that_are_not_finite(capsys, tmp_path):
    nan = lines(tmp_path / "a.jsonl", [{"step": 1, "norm": "NaN"}, {"step": 2, "norm": "Infinity"}])
    other = lines(tmp_path / "b.jsonl", [{"step": 1, "norm": "NaN"}, {"step": 2, "norm": 3.0}])
    assert document(capsys, str(nan), str(nan))["same"]
    found = document(capsys, str(nan), str(other))["parting"]
    assert found["step"] == 2
    assert found["drifts"]["norm"]["largest"] == "Infinity"


def test_a_loss_that_one_run_did_not_log_yet_is_not_compared(capsys, tmp_path):
    """A resumed run logs its first loss later than the other filled in its last."""
    every_tenth = records(range(60))
    for step in range(0, 60, 10):
        every_tenth[step]["loss"] = 1.0 + step
    straight, resumed = lines(tmp_path / "a.jsonl", every_tenth), lines(tmp_path / "b.jsonl", every_tenth[21:])
    assert document(capsys, str(straight), str(resumed))["same"]
    every_tenth[40]["loss"] = 2.0
    resumed = lines(tmp_path / "b.jsonl", every_tenth[21:])
    assert document(capsys, str(straight), str(resumed))["parting"]["step"] == 40


def test_fingerprints_of_other_parameters_are_not_compared(capsys, tmp_path):
    ours = {"fingerprint": "0x01", "fingerprint/a": "0x0000000000000001", "fingerprint/b": "0x00"}
    theirs = {"fingerprint": "0x02", "fingerprint/a": "0x0000000000000001", "fingerprint/c": "0x01"}
    one, other = (lines(tmp_path / f"{k}.jsonl", records([1], **each)) for k, each in enumerate((ours, theirs)))
    assert document(capsys, str(one), str(other))["same"]
    theirs["fingerprint/a"] = "0x0000000000000003"
    other = lines(tmp_path / "1.jsonl", records([1], **theirs))
    assert document(capsys, str(one), str(other))["parting"]["parameters"] == ["a"]


def test_the_fingerprint_of_all_is_compared_where_a_run_has_no_others(capsys, tmp_path):
    ours, theirs = {"fingerprint": "0x01", "fingerprint/a": "0x01"}, {"fingerprint": "0x02"}
    one, other = (lines(tmp_path / f"{k}.jsonl", records([1], **each)) for k, each in enumerate((ours, theirs)))
    assert document(capsys, str(one), str(other))["parting"]["columns"] == ["fingerprint"]


def test_what_cannot_be_printed_does_not_say_that_runs_differ(capfd, monkeypatch, tmp_path):
    run = str(lines(tmp_path / "caf\xe9.jsonl", records([1])))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["diff", run, run]) == 2
    assert "distclip: cannot write: No space left on device" in capfd.readouterr().err
    with open(tmp_path / "said", "w", encoding="ascii") as said:
        monkeypatch.setattr("sys.stdout", said)
        assert main(["diff", run, run]) == 0
    assert "caf\\xe9.jsonl" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("words", [["diff", "nowhere", "nowhere"], ["diff", "{run}", "{run}"], ["--bogus"], ["--help"]])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_where_nothing_can_be_printed_the_exit_code_is_still_2(monkeypatch, tmp_path, words, unbuffered):
    run = lines(tmp_path / "run.jsonl", records([1]))
    with open("/dev/full", "w") as out, open("/dev/full", "w", buffering=1) as err:
        out.reconfigure(write_through=unbuffered)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        try:
            code = main([word.format(run=run) for word in words])
        except SystemExit as ended:
            code = ended.code
    assert code == 2


def test_an_option_that_there_is_not_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--bogus"])
    assert capsys.readouterr().err == "distclip: no such option: --bogus; see distclip --help\n"


def test_what_is_wrong_is_not_printed_as_the_result_where_stderr_is_closed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["diff", "nowhere", "nowhere"]) == 2
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_nan_in_one_run_alone_differs(capsys, tmp_path):
    one = lines(tmp_path / "a.jsonl", [*records([1], loss=1.0), *records([2], loss=2.0)])
    other = lines(tmp_path / "b.jsonl", [*records([1], loss=1.0), *records([2], loss="NaN")])
    found = document(capsys, str(one), str(other))["parting"]
    assert (found["step"], found["columns"]) == (2, ["loss"])


def test_numbers_that_one_run_did_not_log_in_a_step_are_not_compared(capsys, tmp_path):
    """Losses that one run logs less often; steps that only one tells to be skipped."""
    often = [{"step": step, "norm": 1.0, "loss": 1.0 / step, "skip": step == 3} for step in range(1, 9)]
    seldom = [{"step": e["step"], "norm": 1.0, **({"loss": e["loss"]} if e["step"] % 2 else {})} for e in often]
    one, other = lines(tmp_path / "a.jsonl", often), lines(tmp_path / "b.jsonl", seldom)
    found = document(capsys, str(one), str(other))
    assert (found["same"], found["columns"]) == (True, ["loss", "norm"])
    seldom[4]["loss"] = 7.0
    assert document(capsys, str(one), str(lines(other, seldom)))["parting"]["step"] == 5


def sparse(path: Path, name: str, values: dict[int, float]) -> str:
    """The log of steps 0 to 9 with a norm, and one column in some of them."""
    return str(lines(path, [{"step": k, "norm": 1.0} | ({name: values[k]} if k in values else {}) for k in range(10)]))


@pytest.mark.parametrize(
    ("name", "mine", "theirs", "first"),
    [
        ("max_norm", {0: 1.0}, {0: 1.0, 3: 0.5}, 3),
        ("max_norm", {0: 1.0, 3: 0.5}, {0: 1.0, 3: 0.5, 4: 0.5}, None),
        ("max_norm", {5: 1.0}, {0: 0.5, 3: 1.0}, None),  # what the one had before is not known
        ("skip", {3: 1}, {4: 1}, 3),
        ("skip", {4: 1}, {3: 0, 4: 1}, None),
        ("skip", {4: 1}, dict.fromkeys(range(10), 0), 4),
        ("skip", {4: 1}, {}, None),
        ("loss", {3: 1.0}, {4: 2.0}, None),
        ("coef", {3: 0.5}, {3: 0.5, 4: 0.5}, None),
        ("norm/a", {3: 0.5, 5: 1.0}, {4: 0.5, 5: 1.0}, None),
        ("norm/a", {3: 0.5, 5: 1.0}, {4: 0.5, 5: 2.0}, 5),
        ("norm/a", {3: 0.5, 5: float("nan")}, {4: 0.5, 5: 2.0}, 5),
    ],
)
def test_how_an_absent_number_is_read(capsys, tmp_path, name, mine, theirs, first):
    """A bound holds until another is written, and a step is skipped if it is said to be; others are not compared."""
    one, other = sparse(tmp_path / "a.jsonl", name, mine), sparse(tmp_path / "b.jsonl", name, theirs)
    for words in ((one, other), (other, one)):
        parting = document(capsys, *words)["parting"]
        assert (parting and parting["step"]) == first


@pytest.mark.parametrize(("odd", "first"), [(None, None), (8, 8), (9, None)])
def test_bounds_that_move_in_every_step_may_be_logged_less_often_by_one_run(capsys, tmp_path, odd, first):
    bounds = [1.0 / (k + 1) for k in range(10)]
    often = [{"step": k, "loss": 1.0, "norm": 1.0, "max_norm": bound} for k, bound in enumerate(bounds)]
    seldom = [each if k % 4 == 0 else {"step": k, "loss": 1.0} for k, each in enumerate(often)]
    if odd is not None:
        often[odd] = often[odd] | {"max_norm": 7.0}
    one, other = str(lines(tmp_path / "a.jsonl", often)), str(lines(tmp_path / "b.jsonl", seldom))
    for words in ((one, other), (other, one)):
        parting = document(capsys, *words)["parting"]
        assert (parting and parting["step"]) == first


def test_layers_that_are_logged_by_turns_are_not_said_to_differ(capsys, tmp_path):
    ours = [{"step": k, "norm": 1.0, "norm/a" if k % 2 else "norm/b": k} for k in range(6)]
    theirs = [{"step": k, "norm": 1.0, "norm/b" if k % 2 else "norm/a": k} for k in range(6)]
    one, other = (str(lines(tmp_path / f"{k}.jsonl", each)) for k, each in enumerate((ours, theirs)))
    assert document(capsys, one, other)["same"]


@pytest.mark.parametrize("odd", [13, 33])
def test_losses_of_steps_without_a_norm_are_compared(capsys, tmp_path, odd):
    one, other = (
        [{"step": k, "loss": k + float(k == different)} | ({"norm": 1.0} if k % 10 == 0 else {}) for k in range(35)]
        for different in (None, odd)
    )
    found = document(capsys, str(lines(tmp_path / "a.jsonl", one)), str(lines(tmp_path / "b.jsonl", other)))
    assert (found["steps"], found["last"]) == (35, 34)
    assert (found["parting"]["step"], found["parting"]["columns"]) == (odd, ["loss"])


def test_steps_in_which_the_runs_wrote_different_things_are_no_comparison(capsys, tmp_path):
    """A bound that both have is none either."""
    ours = [{"step": 1, "norm": 1.0, "max_norm": 1.0}, {"step": 2, "loss": 1.0}]
    one, other = lines(tmp_path / "a.jsonl", ours), lines(tmp_path / "b.jsonl", records([2], max_norm=1.0))
    code, out, err = diff(capsys, str(one), str(other))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "have no loss, norm or fingerprint in the same step" in err


def test_norms_of_layers_are_compared_as_they_were_written(capsys, tmp_path):
    """Also where float32 could not tell them apart."""
    for mine, theirs in ((0.1, 0.1 + 1e-12), (1e40, 2e40)):
        one, other = (
            lines(tmp_path / f"{k}.jsonl", records([1], **{"norm/a": each})) for k, each in enumerate((mine, theirs))
        )
        assert document(capsys, str(one), str(other))["parting"]["parameters"] == ["a"]


def test_fingerprints_that_part_after_the_last_norm(capsys, tmp_path):
    """Where a log has the norms of some steps."""
    ends = [{"step": 3, "fingerprint/a": "0x1"}], [{"step": 3, "fingerprint/a": "0x2"}]
    one, other = (lines(tmp_path / f"{k}.jsonl", [*records([1, 2]), *end]) for k, end in enumerate(ends))
    found = document(capsys, str(one), str(other))["parting"]
    assert (found["step"], found["parameters"], found["drifts"]) == (3, ["a"], {})


def test_a_fingerprint_without_a_step_is_not_compared(capsys, tmp_path):
    ends = [{"fingerprint/a": "0x1"}], [{"fingerprint/a": "0x2"}]
    one, other = (lines(tmp_path / f"{k}.jsonl", [*records([1, 2]), *end]) for k, end in enumerate(ends))
    assert document(capsys, str(one), str(other))["columns"] == ["norm"]
