"""`watch=`: norms by name in every report, from the same all-reduce, and with them the culprit of a step."""

import copy
import pickle
from collections.abc import Mapping
from math import inf, isnan, nan
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distclip import Clipper, Layout, LayoutError, NonFiniteError, Report, Statistic, attach
from distclip.report import Culprit
from promises.test_accelerator import EXISTS, fill, layers as layers_on_the_accelerator, on_the_accelerator
from support.accelerator import DEVICE, counted_waits, no_waits, raw
from support.oracle import true_norm
from support.ranks import count_collectives, run_ranks, same_bits

BLOCKS = {"first": "0.*", "norms": ("1.*",), "weights": ["*.weight"], "one": "2.bias"}
MEMBERS = {
    "first": ["0.weight", "0.bias"],
    "norms": ["1.weight", "1.bias"],
    "weights": ["0.weight", "1.weight", "2.weight"],
    "one": ["2.bias"],
}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)).to(dtype)


def filled(model: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """With gradients that are the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def of_parameters(model: nn.Module, p: float = 2.0) -> dict[str, float]:
    return {name: true_norm([q.grad], p) for name, q in model.named_parameters() if q.grad is not None}


def of_blocks(model: nn.Module, p: float = 2.0) -> dict[str, float]:
    gradients = {name: q.grad for name, q in model.named_parameters()}
    return {name: true_norm([gradients[each] for each in members], p) for name, members in MEMBERS.items()}


WATCHED = {"parameters": ("parameters", of_parameters), "groups": (BLOCKS, of_blocks)}
EACH_WATCH = pytest.mark.parametrize(("watch", "expected"), WATCHED.values(), ids=WATCHED)


@EACH_WATCH
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
def test_a_report_has_the_norms_that_are_watched_as_they_were_before_clipping(watch, expected, p, clipper_of):
    model = net()
    clipper = clipper_of(model, 0.5, norm_type=p, watch=watch)
    wanted = expected(filled(model), p)
    for report in (clipper.measure(), clipper.clip_()):
        assert report.coef.item() < 1
        assert isinstance(report.norms, Mapping)
        assert list(report.norms) == list(wanted)
        assert {name: norm.item() for name, norm in report.norms.items()} == pytest.approx(wanted, rel=2e-7)
        shown = report.to_dict()
        assert list(shown) == ["norm", "max_norm", "coef", "skip", *(f"norm/{name}" for name in wanted)]
        assert {name: shown[f"norm/{name}"] for name in wanted} == {n: t.item() for n, t in report.norms.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_have_the_dtype_of_the_norm_and_are_views_of_one_tensor(dtype, clipper_of):
    model = filled(net(dtype))
    report = clipper_of(model, 1.0, watch="parameters").measure()
    wanted, norms = of_parameters(model), list(report.norms.values())
    assert {(norm.dtype, norm.shape, norm.device) for norm in norms} == {(report.norm.dtype, (), report.norm.device)}
    assert report.norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert len({norm.untyped_storage().data_ptr() for norm in norms}) == 1
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    assert [norm.item() for norm in norms] == pytest.approx(list(wanted.values()), rel=tolerance)


def test_without_watch_there_are_no_norms(clipper_of):
    report = clipper_of(filled(net()), 1.0).clip_()
    assert (dict(report.norms), list(report.to_dict())) == ({}, ["norm", "max_norm", "coef", "skip"])


def test_a_name_that_is_not_watched_is_a_key_error(clipper_of):
    norms = clipper_of(filled(net()), 1.0, watch=BLOCKS).measure().norms
    assert ("first" in norms, "last" in norms, norms.get("last")) == (True, False, None)
    with pytest.raises(KeyError, match="last"):
        norms["last"]


def test_parameters_without_gradients_have_a_norm_of_zero(clipper_of):
    model = filled(net())
    model[1].weight.grad = None
    norms = clipper_of(model, 1.0, watch="parameters").measure().norms
    assert norms["1.weight"].item() == 0
    assert norms["1.bias"].item() > 0


def test_a_finite_norm_beyond_float32_stays_finite_and_others_show_what_they_are(clipper_of):
    model = filled(net())
    model[0].weight.grad.fill_(3e38)
    model[0].bias.grad[1] = inf
    model[2].weight.grad[0, 3] = nan
    norms = clipper_of(model, 1.0, watch="parameters").measure().norms
    assert norms["0.weight"].item() == torch.finfo(torch.float32).max
    assert norms["0.bias"].item() == inf
    assert isnan(norms["2.weight"].item())
    assert norms["2.bias"].isfinite()


def test_every_call_reports_them_and_attach_does():
    model, wanted = net(), of_parameters(filled(net()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = attach(optimizer, model, 1.0, watch="parameters")
    filled(model)
    optimizer.step()
    assert {name: norm.item() for name, norm in clipper.report.norms.items()} == pytest.approx(wanted, rel=2e-7)
    clipper.detach()
    filled(model)
    report = Clipper(model, 1.0, watch="parameters").step(optimizer)
    assert {name: norm.item() for name, norm in report.norms.items()} == pytest.approx(wanted, rel=2e-7)


@EACH_WATCH
def test_a_step_with_watch_is_the_step_without(watch, expected):
    model, plain = filled(net()), filled(net())
    seen, other = Clipper(model, 0.5, watch=watch).clip_(), Clipper(plain, 0.5).clip_()
    assert seen.norm.item() == pytest.approx(other.norm.item(), rel=1e-7)
    assert all(map(torch.equal, [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]))


# ---- copies of a report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report))])
def test_a_copy_of_a_report_says_the_same(copied):
    report = Clipper(filled(net()), 1.0, watch="parameters").measure()
    other = copied(report)
    assert other.to_dict() == report.to_dict()
    assert list(other.norms) == list(report.norms)
    assert repr(other) == repr(report)


def test_a_deep_copy_keeps_its_numbers_and_no_model():
    model = filled(net())
    report = Clipper(model, 1.0, watch="parameters").measure()
    kept, numbers = copy.deepcopy(report), report.to_dict()
    report.norms.tensor.zero_()
    assert kept.to_dict() == numbers
    assert len(pickle.dumps(report)) < 4000


def test_a_report_made_by_hand_has_norms_of_any_mapping():
    one = torch.ones(())
    report = Report(one, one, one, one > 2, norms={"head": one * 3})
    assert report.to_dict() == {"norm": 1.0, "max_norm": 1.0, "coef": 1.0, "skip": False, "norm/head": 3.0}


# ---- names --------------------------------------------------------------------------------------------------


def experts(how: str) -> dict[str, Any]:
    """On each rank two experts of its own under one name, beside a layer that all ranks hold."""
    model = nn.ModuleDict({"all": nn.Linear(2, 2), "experts": nn.ParameterDict({"w1": torch.zeros(3, 2)})})
    rank, mesh = dist.get_rank(), dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "all" in name else rank)
        parameter.grad = torch.full_like(parameter, 1.0 if "all" in name else rank + 2.0)
    cut = Layout.cut(over=[mesh["ep"]])
    watch: Any = {
        "parameters": "parameters",
        "patterns": {"first": "experts.w1[ep=0]", "both": "experts.w1", "any": "*.w1*", "one": "*.w1[[]ep=1]"},
    }[how]
    clipper = Clipper(model, 1.0, layout=lambda name, p: cut if "experts" in name else None, watch=watch)
    return clipper.measure().to_dict()


def test_parameters_that_differ_between_ranks_have_names_that_say_where():
    shown, other = run_ranks(experts, 2, "parameters")
    assert same_bits([shown, other])
    found = {name: number for name, number in shown.items() if name.startswith("norm/")}
    assert found == pytest.approx(
        {
            "norm/all.weight": 2.0,
            "norm/all.bias": 2**0.5,
            "norm/experts.w1[ep=0]": 2 * 6**0.5,
            "norm/experts.w1[ep=1]": 3 * 6**0.5,
        },
        rel=2e-7,
    )


def test_a_weight_that_two_modules_share_has_the_name_in_the_first():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norms = Clipper(model, 1.0, watch={"embed": "embed.weight", "head": "head.*"}).measure().norms
    assert {name: norm.item() ** 2 for name, norm in norms.items()} == pytest.approx({"embed": 12, "head": 4})


def test_a_pattern_may_be_such_a_name_or_the_one_that_ranks_share():
    shown, other = run_ranks(experts, 2, "patterns")
    assert same_bits([shown, other])
    both = (4 * 6 + 9 * 6) ** 0.5
    wanted = {"norm/first": 2 * 6**0.5, "norm/both": both, "norm/any": both, "norm/one": 3 * 6**0.5}
    assert {name: shown[name] for name in wanted} == pytest.approx(wanted, rel=2e-7)


def under_ddp() -> tuple[dict[str, Any], Any, int]:
    model = DistributedDataParallel(net())
    clipper = Clipper(model, 1.0, watch="parameters")
    filled(model)
    clipper.clip_()  # which compares replicas
    clipper.clip_()
    filled(model)
    with count_collectives() as counts:
        report = clipper.clip_()
    return report.to_dict(), list(report.norms), counts.total()


def test_norms_travel_in_the_one_all_reduce_and_names_are_the_models_own():
    wanted = of_parameters(filled(net()))
    found = run_ranks(under_ddp, 2)
    shown, names, collectives = found[0]
    assert same_bits(found)
    assert collectives == 1
    assert names == list(wanted)
    assert [shown[f"norm/{name}"] for name in names] == pytest.approx(list(wanted.values()), rel=2e-7)


# ---- the culprit --------------------------------------------------------------------------------------------


def blamed(watch: Any, bad: float, mode: str) -> tuple[str, str, int]:
    model = DistributedDataParallel(net())
    clipper = Clipper(model, 1.0, watch=watch, nonfinite=mode)
    filled(model).module[2].weight.grad[0, 5] = bad if dist.get_rank() else 1.0
    with count_collectives() as counts:
        try:
            said = str(clipper.clip_().culprit)
        except NonFiniteError as error:
            said = str(error)
    return said, str(clipper.culprit), counts.total()


@pytest.mark.parametrize(("bad", "kind"), [(nan, "NaN"), (inf, "inf"), (-inf, "inf")])
def test_the_culprit_comes_from_the_norms_and_only_whether_ranks_agree_is_asked(bad, kind):
    found = run_ranks(blamed, 2, "parameters", bad, "skip")
    said, kept, collectives = found[0]
    assert same_bits(found)
    assert (
        said == kept == f"2.weight has {kind} in its gradient; distclip.find_source(model) says which rank it came from"
    )
    assert collectives == 2


def test_the_error_names_the_culprit_too():
    said, *_ = run_ranks(blamed, 2, "parameters", nan, "raise")[1]
    assert "2.weight has NaN in its gradient; distclip.find_source(model) says which rank it came from; no grad" in said


def test_groups_do_not_name_a_parameter_so_that_ranks_are_asked():
    said, *_ = run_ranks(blamed, 2, BLOCKS, nan, "skip")[0]
    assert said == "2.weight on rank 1 has NaN in its gradient"


def test_in_one_process_the_rank_is_known(clipper_of):
    model = filled(net())
    model[1].bias.grad[0] = nan
    clipper = clipper_of(model, 1.0, watch="parameters")
    clipper.clip_()
    clipper.measure()  # the call in which an accelerator's host learns of it
    assert clipper.culprit == Culprit("NaN", "1.bias", 0, (0,))


# ---- what cannot be watched ---------------------------------------------------------------------------------

WRONG = {
    "parameter": "watch must be 'parameters', or patterns of parameters by .* got 'parameter'",
    "row": "watch must be .* got 'row'",
    "{}": "watch must be .* got {}",
    "[]": r"watch must be .* got \['0.weight'\]",
    "statistic": r"watch must be .* got Statistic\(per='row'",
    "nothing matches": r"the group 'heads' is empty, no parameter matches 'head.\*' or 'lm_head.\*': choose among "
    "0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 1 more",
    "no pattern": r"groups must be patterns by name, such as .* got 'a': \(\)",
    "a number": "groups must be patterns by name, such as .* got 'a': 3",
    "a set": "groups must be patterns by name, such as .* got 'a': {'0.weight'}",
    "no name": r"groups must be patterns by name, such as .* got 3: \('0.weight',\)",
}
GIVEN: dict[str, Any] = {
    "{}": {},
    "[]": ["0.weight"],
    "statistic": Statistic("row"),
    "nothing matches": {"first": "0.*", "heads": ("head.*", "lm_head.*")},
    "no pattern": {"a": ()},
    "a number": {"a": 3},
    "a set": {"a": {"0.weight"}},
    "no name": {3: "0.weight"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_watched_is_an_error_that_says_what_can(name):
    with pytest.raises(ValueError, match=WRONG[name]):
        Clipper(net(), 1.0, watch=GIVEN.get(name, name))


def watched_by_one_rank(watch: Any) -> str:
    try:
        Clipper(net(), 1.0, watch=watch if dist.get_rank() else None)
    except (LayoutError, ValueError) as error:
        return str(error)
    return ""


def test_ranks_that_watch_other_things_are_told():
    for said in run_ranks(watched_by_one_rank, 2, "parameters"):
        assert "watch must be the same on every rank" in said


def test_a_rank_whose_watch_is_wrong_does_not_leave_the_others_waiting():
    other, own = run_ranks(watched_by_one_rank, 2, {"a": 3})
    assert "groups must be patterns by name" in own
    assert "could not make its Clipper" in other


# ---- accelerators -------------------------------------------------------------------------------------------


def on_an_accelerator(watch: Any) -> tuple[dict[str, Any], dict[str, float], list[int], str]:
    with on_the_accelerator():
        model = layers_on_the_accelerator()
        clipper = Clipper(model, 1.0, watch=watch)
        fill(model, 0)
        clipper.clip_()  # which compares replicas
        clipper.clip_()
        fill(model, 1)
        wanted = {str(name): true_norm([raw(p.grad)]) for name, p in model.named_parameters()}
        with no_waits():
            report = clipper.clip_()
            each = list(report.norms.values())
        device = {norm.device.type for norm in each}
        assert device == {DEVICE}
        with counted_waits() as waits:
            shown = report.to_dict()
        raw(model[2].grad)[1, 1] = nan
        clipper.clip_()
        fill(model, 2)
        clipper.measure()
        return shown, wanted, waits, str(clipper.culprit)


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("size", [1, 2])
def test_an_accelerator_makes_them_without_a_host_sync_and_a_dictionary_with_one(size):
    for shown, wanted, waits, culprit in run_ranks(on_an_accelerator, size, "parameters", fresh=True):
        assert waits == [1]
        assert {name: shown[f"norm/{name}"] for name in wanted} == pytest.approx(wanted, rel=2e-7)
        assert culprit.startswith("2 ")
        assert "has NaN in its gradient" in culprit
