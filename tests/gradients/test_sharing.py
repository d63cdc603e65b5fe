"""Gradients that share memory are refused by name; no element is ever counted or scaled twice."""

from collections.abc import Callable
from math import inf
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter, ParameterList

import distclip
from distclip.gradients.sharing import first_shared, overlaps_itself
from distclip.kernels import native
from support.oracle import true_norm
from support.ranks import run_ranks, same_bits


def same_tensor() -> list[Tensor]:
    gradient = torch.arange(1.0, 6.0)
    return [gradient, torch.ones(3), gradient]


def same_memory() -> list[Tensor]:
    gradient = torch.arange(1.0, 7.0)
    return [gradient.view(2, 3), torch.ones(3), gradient.view(3, 2)]


def overlapping_views() -> list[Tensor]:
    block = torch.arange(1.0, 10.0)
    return [block[:5], torch.ones(3), block[4:]]


def one_inside_the_other() -> list[Tensor]:
    block = torch.arange(1.0, 10.0)
    return [block, torch.ones(3), block[3:5]]


def crossing_columns() -> list[Tensor]:
    block = torch.arange(1.0, 13.0).view(3, 4)
    return [block[:, :3], torch.ones(3), block[:, 2:]]


def another_dtype() -> list[Tensor]:
    block = torch.ones(8)
    return [block[:4], torch.ones(3), block.view(torch.bfloat16)[6:9]]


def of_numpy() -> list[Tensor]:
    block = torch.ones(8).numpy()
    return [torch.from_numpy(block[:5]), torch.ones(3), torch.from_numpy(block[4:])]


SHARING = [
    same_tensor,
    same_memory,
    overlapping_views,
    one_inside_the_other,
    crossing_columns,
    another_dtype,
    of_numpy,
]
ROADS: dict[str, Callable[[ParameterList], object]] = {
    "clip_grad_norm_": lambda ps: distclip.clip_grad_norm_(list(ps), 1.0),
    "clip_grad_norm_ of a module": lambda ps: distclip.clip_grad_norm_(ps, 1.0),
    "inf-norm": lambda ps: distclip.clip_grad_norm_(list(ps), 1.0, inf),
    "clip_grads_with_norm_": lambda ps: distclip.clip_grads_with_norm_(list(ps), 1.0, torch.tensor(50.0)),
    "Clipper.clip_": lambda ps: distclip.Clipper(ps, 1.0).clip_(),
    "Clipper.measure": lambda ps: distclip.Clipper(ps, 1.0).measure(),
    "Clipper.step": lambda ps: distclip.Clipper(ps, 1.0).step(torch.optim.AdamW(ps.parameters(), fused=True)),
    "Clipper.verify": lambda ps: distclip.Clipper(ps, 1.0).verify(),
}


def holding(gradients: list[Tensor]) -> ParameterList:
    parameters = ParameterList(Parameter(torch.zeros_like(g).contiguous()) for g in gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return parameters


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("make", SHARING)
def test_two_gradients_that_share_memory_are_refused_by_name_and_left_as_they_are(make, road):
    parameters = holding(make())
    before = [g.clone() for g in make()]
    values = [p.detach().clone() for p in parameters]
    with pytest.raises(distclip.LayoutError, match=r"gradients of (parameter )?0.* and (parameter )?2.* share memory"):
        ROADS[road](parameters)
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))
    assert all(map(torch.equal, parameters, values))


@pytest.mark.parametrize("make", [same_tensor, overlapping_views, crossing_columns])
def test_get_total_norm_refuses_memory_in_common_and_counts_a_tensor_listed_twice_once(make):
    gradients = make()
    if make is same_tensor:
        assert distclip.get_total_norm(gradients).item() == pytest.approx(true_norm(gradients[:2]), rel=2e-7)
        gradients[2] = gradients[2].view(-1)
    with pytest.raises(distclip.LayoutError, match="share memory"):
        distclip.get_total_norm(gradients)


def test_a_parameter_listed_twice_does_not_share_with_itself():
    parameter = Parameter(torch.zeros(5))
    parameter.grad = torch.ones(5)
    distclip.clip_grads_with_norm_([parameter, parameter], 1.0, torch.tensor(2.0))
    assert torch.allclose(parameter.grad, torch.full((5,), 0.5))


@pytest.mark.parametrize("make", SHARING)
def test_values_are_clamped_in_shared_memory_too_since_twice_is_once(make):
    parameters = holding(make())
    distclip.clip_grad_value_(list(parameters), 0.5)
    expected = [g.clamp(-0.5, 0.5) for g in make()]
    assert all(torch.equal(p.grad, e) for p, e in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("use", ["function", "clipper"])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_gradients_that_come_to_share_memory_in_a_later_step_are_refused_by_name(after, use, dtype, compiled):
    parameters = [Parameter(torch.zeros(5, dtype=dtype)) for _ in range(4)]
    clipper = distclip.Clipper(ParameterList(parameters), 1.0)
    clip = clipper.clip_ if use == "clipper" else lambda: distclip.clip_grad_norm_(parameters, 1.0)
    with patch.object(native, "kernel", native.kernel if compiled else None):
        for _ in range(after):
            for parameter in parameters:
                parameter.grad = torch.ones(5, dtype=dtype)
            clip()
        parameters[1].grad = parameters[3].grad = torch.ones(5, dtype=dtype)
        with pytest.raises(distclip.LayoutError, match=r"gradients of (parameter )?1.* and (parameter )?3.* share"):
            clip()


def apart_from(block: Tensor) -> list[Tensor]:
    return [torch.ones(4), block[:4].clone(), torch.ones(4), block[:4].clone()]


def neighbours_in(block: Tensor) -> list[Tensor]:
    """The first two in one run."""
    return [block[:4], block[4:8], torch.ones(4), torch.ones(4)]


OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "by half": lambda block: (block[8:12], block[10:14]),
    "by one element": lambda block: (block[8:12], block[11:15]),
}


@pytest.mark.parametrize("use", ["function", "clipper"])
@pytest.mark.parametrize("lie", [apart_from, neighbours_in])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("after", [1, 2, 4, 6])
def test_views_that_come_to_overlap_in_a_later_step_are_refused_by_name(after, overlap, lie, use):
    parameters = [Parameter(torch.zeros(4)) for _ in range(4)]
    clipper = distclip.Clipper(ParameterList(parameters), 1.0)
    clip = clipper.clip_ if use == "clipper" else lambda: distclip.clip_grad_norm_(parameters, 1.0)
    for k in range(after + 1):
        block = torch.ones(16)
        gradients = lie(block)
        if k == after:
            gradients[2:] = OVERLAPS[overlap](block)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if k < after:
            clip()
            continue
        with pytest.raises(distclip.LayoutError, match=r"gradients of (parameter )?2.* and (parameter )?3.* share"):
            clip()


def test_gradients_whose_data_comes_to_be_that_of_another_are_refused():
    parameters = [Parameter(torch.zeros(5)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(5)
    for _ in range(3):
        distclip.clip_grad_norm_(parameters, 1.0)
    parameters[2].grad.data = parameters[0].grad.data
    with pytest.raises(distclip.LayoutError, match=r"parameter 0 .* and parameter 2 .* share"):
        distclip.clip_grad_norm_(parameters, 1.0)


def self_overlapping() -> list[Tensor]:
    return [
        torch.arange(1.0, 8.0).as_strided((3, 3), (1, 1)),
        torch.arange(1.0, 8.0).as_strided((2, 3), (2, 1)),
        torch.ones(1).expand(4, 2),
        torch.arange(1.0, 4.0).unfold(0, 2, 1),
    ]


@pytest.mark.parametrize("road", [*ROADS, "clip_grad_value_"])
@pytest.mark.parametrize("kind", range(4))
def test_a_gradient_that_overlaps_itself_is_counted_and_scaled_once_by_index(kind, road):
    gradient = self_overlapping()[kind]
    assert overlaps_itself(gradient)
    parameters = holding([gradient, torch.ones(3)])
    whole = [gradient.clone(), torch.ones(3)]
    if road == "clip_grad_value_":
        distclip.clip_grad_value_(list(parameters), 0.5)
        assert all(torch.equal(p.grad, w.clamp(max=0.5)) for p, w in zip(parameters, whole, strict=True))
        return
    result = ROADS[road](parameters)
    p = inf if road == "inf-norm" else 2.0
    norm = result.norm if isinstance(result, distclip.Report) else result
    if norm is not None:
        assert norm.item() == pytest.approx(true_norm(whole, p), rel=2e-7)
    if "clip_grad_norm_" in road or road in ("inf-norm", "Clipper.clip_"):
        assert true_norm([q.grad for q in parameters], p) == pytest.approx(1.0, rel=2e-6)
    if road == "clip_grads_with_norm_":
        assert all(torch.allclose(q.grad, w / 50) for q, w in zip(parameters, whole, strict=True))


def test_neighbours_columns_empty_ones_and_interleaved_ones_have_memory_of_their_own():
    block, columns = torch.randn(20), torch.randn(4, 6)
    apart = [
        block[:5],
        block[5:5],
        block[5:12],
        block[12:],
        columns[:, :2],
        columns[:, 2:5],
        columns[:, 5:],
        torch.empty(0),
        torch.empty(3, 0),
        torch.randn(10)[::2],
    ]
    comb = torch.randn(8)
    assert first_shared([*apart, comb[::2], comb[1::2]]) is None
    assert first_shared([*apart, comb[::2], comb[4:5]]) == (10, 11)
    assert first_shared([]) is None
    parameters = holding(apart)
    expected = true_norm([block, columns, apart[-1]])
    norm = distclip.clip_grad_norm_(list(parameters), 0.1)
    assert norm.item() == pytest.approx(expected, rel=2e-7)
    assert true_norm([p.grad for p in parameters]) == pytest.approx(0.1, rel=1e-5)


def test_a_conjugate_is_a_copy_and_shares_nothing():
    weight, other = Parameter(torch.zeros(3, dtype=torch.complex64)), Parameter(torch.zeros(3, dtype=torch.complex64))
    gradient = torch.randn(3, dtype=torch.complex64)
    weight.grad, other.grad = gradient.conj(), gradient
    norm = distclip.clip_grad_norm_([weight, other], 1e9)
    assert norm.item() == pytest.approx(true_norm([gradient.abs(), gradient.abs()]), rel=2e-7)


def sharing_on_one_rank(road: str, make: Callable[[], list[Tensor]]) -> tuple[str, list[Tensor]]:
    gradients = make()
    if dist.get_rank() != 1:
        gradients = [g.clone() for g in gradients]
    parameters = holding(gradients)
    clipper = distclip.Clipper(parameters, 1.0)
    try:
        if road == "function":
            distclip.clip_grad_norm_(list(parameters), 1.0, group=dist.group.WORLD)
        else:
            clipper.clip_()
    except distclip.LayoutError as error:
        return str(error), [p.grad for p in parameters]
    return "no error", []


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("road", ["function", "clipper"])
@pytest.mark.parametrize("make", [same_tensor, overlapping_views])
def test_shared_memory_on_one_rank_is_an_error_on_all(make, road, size):
    results = run_ranks(sharing_on_one_rank, size, road, make)
    assert "share memory" in results[1][0]
    for rank, (said, gradients) in enumerate(results):
        assert rank == 1 or "rank 1: stopped: the gradients of " in said
        assert all(map(torch.equal, gradients, make()))
    assert same_bits([gradients for _, gradients in results])
