"""DeepSpeed with a Clipper that took over gives the norms and parameters of one process, at every ZeRO stage.

Two launches run the sample of every run, two the rest: starting processes and importing DeepSpeed is what costs. ZeRO 3
patches F.linear for the life of a process, so the processes are fresh and all ranks run the cases in one order.
"""

from functools import cache
from importlib.util import find_spec
from math import isnan

import pytest
import torch

import distclip
from integrations import deepspeed_runs as runs
from integrations.launches import once
from support.own_policy import OwnRunningMean
from support.ranks import run_ranks, same_bits
from support.samples import rare

if find_spec("deepspeed") is None:  # importing it patches torch: only the ranks do
    pytest.skip("needs the extra: pip install 'distclip[deepspeed]'", allow_module_level=True)

BOUND, NAN_AT = runs.BOUND, runs.NAN_AT
PLACES = ["0", "1", "2", "2 offloaded", "3", "3 offloaded"]
SAMPLE = [name for name in runs.CASES if name not in runs.THOROUGH]
PLACES_IN_SAMPLE = [place for place in PLACES if place != "3 offloaded"]
IN_PLACES = [*PLACES_IN_SAMPLE, rare("3 offloaded")]
TRAININGS = [
    *((2, name) if name in SAMPLE else rare(2, name) for name in runs.CASES),
    *((4, name) if name in runs.SAMPLE_ON_FOUR else rare(4, name) for name in runs.ON_FOUR),
]
REDUCED = "embed.weight has NaN in its reduced gradient, held by ranks 0, 1"
NONFINITE = (
    "NonFiniteError: The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped"
)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """launch(size, rest): what every rank brings home from the sample, or from the rest of the cases."""

    def launch(size, rest):
        names, sample, places = (runs.CASES, SAMPLE, PLACES) if size == 2 else (runs.ON_FOUR, runs.SAMPLE_ON_FOUR, [])
        chosen = [name for name in names if (name not in sample) == rest]
        where = [place for place in places if (place not in PLACES_IN_SAMPLE) == rest]
        folder = str(tmp_path_factory.mktemp("checkpoints"))
        return once(
            tmp_path_factory,
            f"deepspeed-{size}{'-rest' * rest}",
            lambda: run_ranks(runs.launch, size, chosen, where, folder, fresh=True),
        )

    return cache(launch)


@pytest.fixture
def launched(launches):
    """What every rank brought home from one case: launch(size, key)."""

    def results(size, key):
        ranks = launches(size, False)
        found = [rank[key] for rank in (ranks if key in ranks[0] else launches(size, True))]
        stories = [story for story in found if isinstance(story, str)]
        assert not stories, stories[0]
        return found

    return results


@pytest.fixture(scope="module")
def alone():
    known = {}
    return lambda fn, *args: known.setdefault((fn.__name__, str(args)), fn(*args))


def close(parameters, expected, atol=1e-5):
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)


def scale(gradients, norm):
    for gradient in gradients:
        gradient.mul_(min(1.0, BOUND / (norm + 1e-6)))


def clamp(gradients, norm):
    for gradient in gradients:
        gradient.clamp_(-0.1, 0.1)


@pytest.mark.parametrize(("size", "name"), TRAININGS)
def test_max_norm_is_that_of_one_process(launched, alone, size, name):
    ranks = launched(size, (name, "MaxNorm"))
    expected = alone(runs.by_hand, scale)
    assert min(expected["norms"]) < BOUND < max(expected["norms"]), "the bound must lie between the norms"
    assert same_bits([rank["norms"] for rank in ranks])
    assert same_bits([rank["parameters"] for rank in ranks])
    found, bf16 = ranks[0], runs.CASES[name].bf16
    assert found["norms"] == pytest.approx(expected["norms"], rel=3e-2 if bf16 else 1e-6)
    assert found["norms"] == [report["norm"] for report in found["reports"]]
    assert found["true"] == pytest.approx(found["norms"] if bf16 else [], rel=1e-6)
    close(found["parameters"], expected["parameters"], atol=1e-2 if bf16 else 1e-5)
    assert found["skipped"] == 0


@pytest.mark.parametrize(("size", "name"), TRAININGS)
def test_autoclip_goes_on_after_a_spoiled_batch_of_one_rank(launched, alone, size, name):
    ranks = launched(size, (name, "AutoClip"))
    expected = alone(runs.alone, distclip.AutoClip(30), NAN_AT)
    assert same_bits([rank["norms"] for rank in ranks])
    found, bf16 = ranks[0], runs.CASES[name].bf16
    assert [report["skip"] for report in found["reports"]] == [step == NAN_AT for step in range(runs.STEPS)]
    assert any(report["coef"] < 1 for report in found["reports"])
    for key in ("norm", "max_norm", "coef"):
        mine, theirs = ([report[key] for report in run["reports"]] for run in (found, expected))
        assert mine == pytest.approx(theirs, rel=3e-2 if bf16 else 1e-6, nan_ok=True)
    assert isnan(found["norms"][NAN_AT])
    close(found["parameters"], expected["parameters"], atol=1e-2 if bf16 else 1e-5)
    assert [rank["unchanged"] for rank in ranks] == [True] * size
    assert [rank["skipped"] for rank in ranks] == [1] * size
    (culprit,) = {rank["culprit"] for rank in ranks}
    assert culprit.startswith(("embed.weight on rank 0 has NaN in its gradient", REDUCED)), "a part, or a copy of all"


@pytest.mark.parametrize("place", IN_PLACES)
def test_values_are_clipped_on_the_partitions(launched, alone, place):
    found, expected = launched(2, (place, "ValueClip"))[0], alone(runs.by_hand, clamp)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    close(found["parameters"], expected["parameters"])


@pytest.mark.parametrize("place", [*IN_PLACES, "0 bf16", "1 bf16", "2 bf16", "3 bf16"])
def test_a_policy_by_unit_bounds_each_parameter_whatever_holds_its_parts(launched, alone, place):
    ranks, bf16 = launched(2, (place, "by unit")), "bf16" in place
    expected = alone(runs.alone, OwnRunningMean(), None, bool, "parameters")
    for key in ("reports", "parameters"):
        assert same_bits([rank[key] for rank in ranks])
    found = ranks[0]
    assert sum(report["coef"] < 0.9 for report in found["reports"]) > 5
    for mine, theirs in zip(found["reports"], expected["reports"], strict=True):
        assert theirs.keys() - mine.keys() == {"norm/frozen.weight"}  # which no optimizer holds
        assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=3e-2 if bf16 else 1e-6)
    close(found["parameters"], expected["parameters"], atol=1e-2 if bf16 else 1e-6)


@pytest.mark.parametrize("place", IN_PLACES)
@pytest.mark.parametrize("nan_at", [None, NAN_AT])
def test_a_parameter_without_gradient_is_not_stepped_by_an_older_one(launched, alone, place, nan_at):
    found = launched(2, (place, "branching" if nan_at is None else "branching, NaN"))[0]
    expected = alone(runs.alone, distclip.MaxNorm(BOUND), nan_at, every_other)
    norms = [report["norm"] for report in expected["reports"]]
    assert found["norms"] == pytest.approx(norms, rel=1e-6, nan_ok=True)
    close(found["parameters"], expected["parameters"])


@pytest.mark.parametrize("place", IN_PLACES)
def test_a_later_backward_of_a_step_does_not_add_to_an_older_step(launched, alone, place):
    found, expected = launched(2, (place, "by halves"))[0], alone(runs.alone_by_halves)
    assert isnan(found["norms"][NAN_AT])
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6, nan_ok=True)
    close(found["parameters"], expected["parameters"])


def every_other(step):
    return step % 2 == 0


@pytest.mark.parametrize("place", IN_PLACES)
def test_a_resumed_run_makes_the_same_decisions(launched, place):
    assert launched(2, (place, "resumed")) == [True, True]


@pytest.mark.parametrize("place", IN_PLACES)
def test_a_policy_may_skip_a_finite_step(launched, alone, place):
    ranks = launched(2, (place, "skipping"))
    expected = alone(runs.alone, runs.SkipAbove(BOUND))
    skips = [report["skip"] for report in expected["reports"]]
    assert 0 < sum(skips) < runs.STEPS
    for found in ranks:
        assert [report["skip"] for report in found["reports"]] == skips
        assert found["counts"] == (sum(skips), runs.STEPS - sum(skips), sum(skips))
        assert found["scale"] == 1024.0
        close(found["parameters"], expected["parameters"])


@pytest.mark.parametrize("place", IN_PLACES)
def test_a_loop_that_catches_a_step_that_raises_goes_on_at_the_right_micro_batch(launched, alone, place):
    ranks, expected = launched(2, (place, "caught")), alone(runs.alone, distclip.MaxNorm(BOUND), NAN_AT)
    norms = [report["norm"] for report in expected["reports"]]
    for found in ranks:
        assert found["norms"] == pytest.approx(norms, rel=1e-6, nan_ok=True)
        assert isnan(found["norms"][NAN_AT])
        assert found["counts"] == (runs.STEPS, 2 * runs.STEPS, 1)
        close(found["parameters"], expected["parameters"])


@pytest.mark.parametrize("place", IN_PLACES)
def test_a_step_costs_one_small_all_reduce(launched, place):
    theirs, ours = launched(2, (place, "collectives"))[0]
    assert ours["allreduce"] == 1
    assert theirs["allreduce"] == (1 if place == "0" else 2)
    assert {**ours, "allreduce": 0} == {**theirs, "allreduce": 0}


@pytest.mark.parametrize("place", ["0", "1", "1, fp32 sums", "2", "3"])
def test_bf16_is_scaled_in_fp32(launched, place):
    assert max(launched(2, (place, "scaled in fp32"))) < 1e-4


@pytest.mark.parametrize("stage", ["1", "2", "3"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_loss_scale_changes_neither_norms_nor_steps(launched, alone, stage, dynamic):
    found, expected = launched(2, (stage, "scaled loss", dynamic))[0], alone(runs.by_hand, scale)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert found["scales"][-1] == (8192.0 if dynamic else 1024.0)
    close(found["parameters"], expected["parameters"])


@pytest.mark.parametrize("stage", ["0", "1", "2"])
@pytest.mark.parametrize("split", [1, 2])
def test_experts_are_parameters_of_their_own_and_partitions_parts_of_one(launched, stage, split):
    """Two ranks that share all experts, or have two each: under the same names."""
    for rank, found in enumerate(launched(2, (stage, "where", split))):
        partitioned = stage != "0"
        for name, place in found.items():
            where = f"axis0={rank}" if "deepspeed_experts" in name and split == 2 else ""
            assert place == (where, partitioned), name
        assert partitioned or any("deepspeed_experts" in name for name in found)


@pytest.mark.parametrize("stage", ["0", "1", "2"])
@pytest.mark.parametrize("split", [1, 2])
def test_experts_count_once(launched, stage, split):
    for found in launched(2, (stage, "experts", split)):
        assert {coef < 1 for _, _, coef in found} == {True, False}
        for norm, expected, coef in found:
            assert norm == pytest.approx(expected, rel=1e-6)
            assert coef == pytest.approx(min(1.0, 2.0 / (expected + 1e-6)), rel=1e-6)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("twice", "ValueError: this engine was taken over before"),
        ("no engine", "ValueError: take_over needs the engine that deepspeed.initialize returned"),
        ("two callers", "RuntimeError: engine.step() clips with this Clipper already"),
        ("detach", "RuntimeError: engine.step() calls this Clipper as long as it lives"),
        (
            "not kept",
            f"Clipper(MaxNorm(max_norm={BOUND}), norm_type=2, 12 parameters, 2 ranks, 0 steps, "
            "called by engine.step()), None",
        ),
        ("inside accumulation", "RuntimeError: DeepSpeed has no reduced gradients now"),
        (
            "verify",
            "NotImplementedError: verify() compares copies of gradients, and the partitions of DeepSpeedZeroOpt",
        ),
        ("verify_every", "NotImplementedError: verify() compares copies of gradients, and the partitions of DeepSpeed"),
        ("nothing reduced", "RuntimeError: DeepSpeed has no reduced gradients now"),
        ("explicit", 'UserWarning: "gradient_clipping": 0.7 in the DeepSpeed config is off from now on'),
        ("default", "1.0, nothing, 0.0"),
        ("propagate", "NotImplementedError: take_over does not support nonfinite='propagate' with FP16_Unfused"),
        ("muon", "NotImplementedError: take_over does not support Muon"),
        ("rows", "LayoutError: layout= says that ranks hold parts of "),
        ("patterns", "ValueError: the group 'a' is empty, no parameter matches 'nowhere.*'"),
        ("deepcompile", 'NotImplementedError: take_over does not support "compile": {"deepcompile": true}'),
        ("autocast", 'NotImplementedError: take_over does not support "torch_autocast" in float16'),
        ("mpu", "NotImplementedError: take_over does not support ranks that hold different parts of the model (mpu"),
        ("pipeline", "NotImplementedError: take_over does not support PipelineModule"),
        ("nonfinite 0", f"{NONFINITE}: {REDUCED}"),
        ("nonfinite 1", f"{NONFINITE}: embed.weight on rank 0 has NaN"),
    ],
)
def test_what_is_refused_says_so(launched, what, message):
    for found in launched(2, "refusals"):
        assert found[what].startswith(message)
