"""Gradients side by side in memory are summed and scaled as one, and never when they are not."""

import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import distclip
from distclip import kernels
from distclip.gradients.memory import Noted
from distclip.kernels import sums
from support.oracle import true_norm
from support.ranks import run_ranks

SIZES = (100, 64, 1, 7, 300)


def laid_out(sizes=SIZES, dtype=torch.float32, gap=0, seed=0) -> tuple[Tensor, list[Parameter]]:
    """One block, and parameters whose gradients are views of it, ``gap`` elements apart."""
    block = torch.randn(sum(sizes) + gap * len(sizes), generator=torch.Generator().manual_seed(seed)).to(dtype)
    parameters, start = [], 0
    for size in sizes:
        parameters.append(Parameter(torch.zeros(size, dtype=dtype)))
        parameters[-1].grad = block[start : start + size]
        start += size + gap
    return block, parameters


class Summed:
    """How many tensors the kernel was handed in each call."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __enter__(self) -> list[int]:
        def counted(tensors, p, bits):
            self.counts.append(len(tensors))
            return kernels.power_sum(tensors, p, bits)

        self._patch = patch.object(sums, "power_sum", counted)
        self._patch.__enter__()
        return self.counts

    def __exit__(self, *error) -> None:
        self._patch.__exit__(*error)


def clip(parameters, bound=1e9):
    """The norm by the function, checked against the oracle, which sees each gradient by itself."""
    expected = true_norm([p.grad for p in parameters if p.grad is not None])
    norm = distclip.clip_grad_norm_(parameters, bound).item()
    assert norm == pytest.approx(expected, rel=2e-7)
    return norm


@pytest.mark.parametrize("order", [1, -1])
def test_neighbours_are_one_run_in_any_order(order):
    _, parameters = laid_out()
    with Summed() as counts:
        clip(parameters[::order])
        clip(parameters[::order])
    assert counts == [1, 1]


def test_a_clipper_merges_too_and_scales_each_element_once():
    block, parameters = laid_out()
    before = block.clone()
    clipper = distclip.Clipper(torch.nn.ParameterList(parameters), 1.0)
    with Summed() as counts:
        coef = clipper.clip_().coef.item()
    assert counts == [1]
    assert 0 < coef < 1
    assert torch.equal(block, before * coef)


def test_elements_between_neighbours_are_neither_summed_nor_scaled():
    block, parameters = laid_out(gap=3)
    between = torch.ones(len(block), dtype=torch.bool)
    for p in parameters:
        between[p.grad.storage_offset() : p.grad.storage_offset() + p.grad.numel()] = False
    kept = block[between].clone()
    with Summed() as counts:
        clip(parameters, 0.5)
    assert counts == [len(SIZES)]
    assert torch.equal(block[between], kept)


def test_a_block_that_moves_as_a_whole_stays_merged():
    _, parameters = laid_out()
    with Summed() as counts:
        for seed in range(6):
            _, others = laid_out(seed=seed)
            for p, other in zip(parameters, others, strict=True):
                p.grad = other.grad
            clip(parameters)
    assert counts == [1] * 6


def test_a_gradient_that_leaves_the_block_is_noticed():
    block, parameters = laid_out()
    clip(parameters)
    parameters[2].grad = torch.full((1,), 1e6)  # the block still holds the old one in between
    assert clip(parameters) >= 1e6
    parameters[1].grad = None
    clip(parameters)
    parameters[2].grad.data = torch.full((1,), 1e7)  # the same object, elsewhere
    assert clip(parameters) >= 1e7
    block *= 2
    clip(parameters, 0.25)
    assert true_norm([p.grad for p in parameters if p.grad is not None]) == pytest.approx(0.25, rel=1e-5)


def test_a_changed_dtype_is_noticed():
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    block = torch.randn(sum(p.numel() for p in module.parameters()))
    start = 0
    for p in module.parameters():
        p.grad = block[start : start + p.numel()].view_as(p)
        start += p.numel()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module.to(dtype)  # changes the tensors in place
        clip(list(module.parameters()))


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_a_transposed_gradient_is_summed_as_it_lies(shape):
    """Strides change while the address stays: the elements from there on are the same, those of a slice are not."""
    square = torch.randn(12, 12)
    parameter = Parameter(torch.zeros(shape))
    parameter.grad = square.view(-1)[:30].view(shape)
    clip([parameter])
    parameter.grad = square[: shape[0], : shape[1]]
    clip([parameter], 0.5)
    assert true_norm([parameter.grad]) == pytest.approx(0.5, rel=1e-5)


def test_neighbours_by_chance_in_storages_of_their_own_are_not_merged():
    memory = bytearray(4 * sum(SIZES))
    _, parameters = laid_out()
    clip(parameters)
    start = 0
    for p in parameters:
        p.grad = torch.frombuffer(memory, dtype=torch.float32, count=p.numel(), offset=4 * start)
        p.grad.copy_(torch.randn(p.numel()))
        start += p.numel()
    with Summed() as counts:
        clip(parameters)
        clip(parameters, 0.5)
    assert counts == [len(SIZES)] * 2
    assert true_norm([p.grad for p in parameters]) == pytest.approx(0.5, rel=1e-5)


def by_turns_split_and_copied() -> tuple[float, float, list[int]]:
    _, parameters = laid_out()
    layout = {id(p): distclip.Layout(1 + i % 2) for i, p in enumerate(parameters)}
    with Summed() as counts:
        norm = distclip.clip_grad_norm_(parameters, 1e9, layout=lambda _, p: layout[id(p)])
    squares = sum(2 * true_norm([p.grad]) ** 2 / layout[id(p)].replicas for p in parameters)
    return norm.item(), squares**0.5, counts


def test_neighbours_with_other_replicas_are_not_one_run():
    for norm, expected, counts in run_ranks(by_turns_split_and_copied, 2):
        assert norm == pytest.approx(expected, rel=2e-7)
        assert counts == [3, 2]


@pytest.mark.parametrize(
    "use", [distclip.clip_grad_norm_, lambda ps, bound: distclip.get_total_norm([p.grad for p in ps])]
)
def test_no_gradient_is_kept_alive(use):
    _, parameters = laid_out()
    clipper = distclip.Clipper(torch.nn.ParameterList(parameters), 1.0)
    for _ in range(3):
        use(parameters, 1.0)
        clipper.clip_()
    storages = [weakref.ref(p.grad) for p in parameters]
    for p in parameters:
        p.grad = None
    gc.collect()
    assert all(reference() is None for reference in storages)


def test_what_never_lies_alike_is_summed_right_at_every_step():
    parameters = [Parameter(torch.zeros(size)) for size in SIZES]
    keep = []
    for step in range(40):
        _, others = laid_out(gap=step % 3, seed=step)
        keep.append(others)
        for k, (p, other) in enumerate(zip(parameters, others, strict=True)):
            p.grad = None if (step + k) % 4 == 0 else other.grad
        clip(parameters, 1.0)


def test_the_same_bits_in_a_process_where_they_lie_elsewhere():
    """A resumed job sums in the same order, though its allocator hands out other addresses."""

    def norms(shuffled: bool) -> list[float]:
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(1000 + 13 * k, generator=generator) for k in range(20)]
        order = list(range(20))[:: -1 if shuffled else 1]
        places = {k: values[k].clone() for k in order}
        model = torch.nn.ParameterList(Parameter(torch.zeros_like(v)) for v in values)
        for k, p in enumerate(model):
            p.grad = places[k]
        clipper = distclip.Clipper(model, distclip.AutoClip(window=3))
        for _ in range(3):
            clipper.clip_()
        return clipper.state_dict()["policy"]["norms"].tolist()

    assert norms(False) == norms(True)


def test_noting_in_vain_rests_for_longer_and_longer():
    """Gradients whose sizes change at every step: noted in the steps 1, 3, 7, 15, 31, ... only."""
    parameter = Parameter(torch.zeros(1))
    clipper = distclip.Clipper(torch.nn.ParameterList([parameter]), 1.0)
    noted, of = [], Noted.of
    with patch.object(Noted, "of", lambda *arguments: noted.append(step) or of(*arguments)):
        for step in range(1, 41):
            parameter.grad = None
            parameter.data = torch.zeros(step)
            parameter.grad = torch.ones(step)
            assert clipper.clip_().norm.item() == pytest.approx(step**0.5)
    assert noted == [1, 3, 7, 15, 31]


def test_gradients_that_become_neighbours_are_found():
    """Whoever was apart is looked at again from time to time: DDP lays its buckets out anew after one backward."""
    _, parameters = laid_out()
    clipper = distclip.Clipper(torch.nn.ParameterList(parameters), 1.0)
    for p in parameters:
        p.grad = torch.randn_like(p)
    with Summed() as counts:
        clipper.clip_()
        for p, other in zip(parameters, laid_out()[1], strict=True):
            p.grad = other.grad
        for _ in range(7):
            clipper.clip_()
    assert counts[0] == len(SIZES)
    assert counts[-1] == 1
