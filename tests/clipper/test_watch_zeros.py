"""`watch_zeros=True`: which share of each gradient is 0, counted where its norm is, from the same all-reduce."""

from functools import partial
from math import inf, isnan

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distclip import AGC, Clipper, attach
from distclip.kernels import native
from distclip.telemetry import Log
from promises.test_accelerator import EXISTS, fill, layers, on_the_accelerator
from promises.test_statistics import labelled
from support import parallel
from support.accelerator import no_waits, raw
from support.parallel import by_name
from support.ranks import count_collectives, run_ranks, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUPS = {"weights": "*.weight", "all": "*", "unseen": "2.*"}


@pytest.fixture(params=["compiled", "torch"])
def _kernel(request, monkeypatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "kernel", None)
    elif native.kernel is None:
        pytest.skip("needs the compiled kernel, which this install did not build or DISTCLIP_NATIVE=0 leaves alone")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With gradients of which a third is 0, or -0, and none in the last layer; a large one, and one with gaps."""
    model = nn.Sequential(nn.Linear(300, 1001), nn.Linear(7, 5), nn.Linear(2, 2)).to(dtype)
    for k, parameter in enumerate([*model[0].parameters(), *model[1].parameters()]):
        generator = torch.Generator().manual_seed(k)
        gradient = torch.randn(parameter.shape, generator=generator) * 1e-3
        gradient[torch.rand(parameter.shape, generator=generator) < 1 / 3] = -0.0 if k % 2 else 0.0
        parameter.grad = gradient.to(dtype)
    model[1].weight.grad = torch.empty(7, 10, dtype=dtype)[:, ::2].t().copy_(model[1].weight.grad)
    return model


def share(*gradients: Tensor | None) -> float:
    """Of zeros in these; where there is none, its elements are not known to be 0."""
    return sum(0 if g is None else int((g == 0).sum()) for g in gradients) / sum(
        0 if g is None else g.numel() for g in gradients
    )


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", [1.0, AGC()], ids=["parameters", "rows"])
def test_a_report_has_the_share_of_zeros_of_each_parameter(dtype, policy, clipper_of):
    model = net(dtype)
    zeros = clipper_of(model, policy, watch="parameters", watch_zeros=True).measure().zeros
    seen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name: zeros[name].item() for name in seen} == pytest.approx(
        {n: share(g) for n, g in seen.items()}, abs=1e-6
    )
    assert all(0.2 < zeros[name] < 0.5 for name in ("0.weight", "0.bias"))
    assert all(isnan(zeros[name]) for name in ("2.weight", "2.bias"))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_groups_count_elements_without_a_gradient_as_not_zero(p, clipper_of):
    model = net()
    report = clipper_of(model, 1.0, norm_type=p, watch=GROUPS, watch_zeros=True).measure()
    found, all_elements = report.to_dict(), sum(q.numel() for q in model.parameters())
    zeros = sum(int((q.grad == 0).sum()) for q in model.parameters() if q.grad is not None)
    assert found["zeros/all"] == pytest.approx(zeros / all_elements, abs=1e-6)
    assert isnan(found["zeros/unseen"])
    assert list(found)[-3:] == ["zeros/weights", "zeros/all", "zeros/unseen"]


def test_a_gradient_of_zeros_alone_has_a_share_of_1(clipper_of):
    model = nn.Linear(3, 2)
    model.weight.grad = torch.zeros(2, 3)
    model.bias.grad = torch.tensor([0.0, torch.nan])
    zeros = clipper_of(model, 1.0, watch="parameters", watch_zeros=True).measure().zeros
    assert {name: zero.item() for name, zero in zeros.items()} == {"weight": 1.0, "bias": 0.5}


def test_a_complex_number_is_zero_where_both_of_its_parts_are(clipper_of):
    model = nn.ParameterDict({"z": nn.Parameter(torch.ones(4, dtype=torch.complex64))})
    model["z"].grad = torch.tensor([0, 1j, 1, 1 + 1j])
    assert clipper_of(model, 1.0, watch="parameters", watch_zeros=True).measure().zeros["z"].item() == 0.25


@pytest.mark.parametrize("policy", [1.0, AGC()], ids=["parameters", "rows"])
def test_what_a_sparse_gradient_does_not_have_is_zero(policy):
    model = nn.Embedding(10, 4, sparse=True)
    model(torch.tensor([1, 1, 3])).square().sum().backward()
    zeros = Clipper(model, policy, watch="parameters", watch_zeros=True).measure().zeros
    assert zeros["weight"].item() == pytest.approx(0.8)


def test_steps_hooks_and_telemetry_have_them():
    model, records = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = attach(optimizer, model, 1.0, watch="parameters", watch_zeros=True)
    log = Log(clipper, lambda record, step: records.append(record), every=1)
    wanted = share(model[0].bias.grad)
    optimizer.step()
    log.close()
    assert clipper.report.zeros["0.bias"].item() == pytest.approx(wanted, abs=1e-6)
    assert records[0]["grad_zeros/layer/0.bias"] == pytest.approx(wanted, abs=1e-6)


def test_without_it_there_are_none_and_the_message_is_as_it_was():
    model = net()
    watched, counted = (Clipper(model, 1.0, watch="parameters", watch_zeros=z) for z in (False, True))
    assert watched.measure().zeros == {}
    lengths = [clipper.engine.plan.length for clipper in (watched, counted)]
    assert lengths == [6, 12]
    assert torch.equal(watched.measure().norm, counted.measure().norm)


def test_what_cannot_be_counted_is_said():
    with pytest.raises(ValueError, match="watch_zeros counts in the gradients that are watched: say which"):
        Clipper(net(), 1.0, watch_zeros=True)
    with pytest.raises(ValueError, match=r"watch_zeros=True counts elements, .* norm_type=inf: use another norm_type"):
        Clipper(net(), 1.0, watch="parameters", watch_zeros=True, norm_type=inf)


# ---- many ranks ----------------------------------------------------------------------------------------------


def counted(layout, by_row: bool) -> tuple:
    """Shares, their names, the whole gradients, and how many collectives a step made. Every second element is 0."""
    job = layout(torch.float32, 30.0)
    job.backward()
    policy = AGC() if by_row else 1.0
    clipper = Clipper(job.parts, policy, watch="parameters", watch_zeros=True, **job.options)
    clipper.measure()  # misplaced gradients are in place from now on
    for p in job.parameters():
        if p.grad is not None:
            local = p.grad._local_tensor if isinstance(p.grad, DTensor) else p.grad
            local[local.contiguous().view(torch.int32) % 2 == 0] = 0.0  # the same elements of copies
    whole = by_name(job.whole())
    with count_collectives() as counts:
        report = clipper.measure()
    return torch.stack(list(report.zeros.values())), list(report.zeros), whole, counts.total()


@pytest.mark.parametrize("by_row", [False, True], ids=["parameters", "rows"])
@pytest.mark.parametrize(("layout", "size"), [("pp_gpipe", 2), ("uneven", 3), ("hsdp", 4), ("fsdp2_tp", 4)])
def test_copies_count_once_and_shares_are_of_the_whole_in_one_all_reduce(layout, size, by_row):
    made = getattr(parallel, layout)
    results = run_ranks(partial(counted, made, by_row), size)
    shares, names, whole, collectives = results[0]
    assert same_bits([each[0] for each in results])
    assert collectives == 1
    units = labelled(whole, names, interleaved=False)
    right = [share(units[name]) for name in names]
    assert shares.tolist() == pytest.approx(right, abs=1e-6)
    assert 0 < sum(right) < len(right)


def differing() -> None:
    with pytest.raises(ValueError, match="watch_zeros"):
        Clipper(net(), 1.0, watch="parameters", watch_zeros=dist.get_rank() == 0)


def test_ranks_that_do_not_agree_on_it_are_told():
    run_ranks(differing, 2)


# ---- an accelerator ------------------------------------------------------------------------------------------


def on_an_accelerator(by_row: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Shares, and what they should be."""
    with on_the_accelerator():
        model = layers()
        clipper = Clipper(model, AGC() if by_row else 1.0, watch="parameters", watch_zeros=True)
        fill(model, 0)
        clipper.clip_()  # which compares replicas
        clipper.clip_()
        fill(model, 1)
        for parameter in model:
            raw(parameter.grad)[:1] = 0.0
        right = {str(name): share(raw(p.grad)) for name, p in model.named_parameters()}
        with no_waits():
            report = clipper.clip_()
        return {name: zero.item() for name, zero in report.zeros.items()}, right


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("by_row", [False, True], ids=["parameters", "rows"])
def test_an_accelerator_counts_without_a_host_sync(by_row):
    for found, right in run_ranks(on_an_accelerator, 2, by_row, fresh=True):
        assert found == pytest.approx(right, abs=1e-6)
        assert all(0 < zero < 1 for zero in found.values())
