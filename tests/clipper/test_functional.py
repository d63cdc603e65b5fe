"""The four drop-in functions: torch's behaviour where torch is right, an error where it is not."""

from functools import partial
from math import inf, nan

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn import utils as torch_clip

import distclip
from support.entries import count_entries
from support.layouts import backward, build, ddp, fsdp2
from support.oracle import same_tensors, true_norm, whole_gradients
from support.ranks import count_collectives, run_ranks, same_bits


def parameters(*values: list[float], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One parameter for each list of gradient elements."""
    made = [nn.Parameter(torch.zeros(len(v), dtype=dtype)) for v in values]
    for p, v in zip(made, values, strict=True):
        p.grad = torch.tensor(v, dtype=dtype)
    return made


def gradients(made: list[nn.Parameter]) -> list[list[float]]:
    return [p.grad.tolist() for p in made]


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 3.0, inf])
@pytest.mark.parametrize("bound", [0.5, 100.0])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_plain_model_is_clipped_as_torch_does(p, bound, foreach):
    ours, theirs = build(), build()
    backward(ours)
    backward(theirs)
    mine = distclip.clip_grad_norm_(ours.parameters(), bound, p, foreach=foreach)
    torchs = torch_clip.clip_grad_norm_(theirs.parameters(), bound, p, foreach=foreach)
    assert mine.item() == pytest.approx(torchs.item(), rel=1e-6)
    assert (mine.dtype, mine.shape, mine.device) == (torchs.dtype, torchs.shape, torchs.device)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-9)
    assert same_tensors(whole_gradients(ours.parameters()), whole_gradients(build().parameters())) is False


def test_the_two_halves_make_the_whole():
    ours, halves = parameters([3.0], [4.0, 12.0]), parameters([3.0], [4.0, 12.0])
    norm = distclip.clip_grad_norm_(ours, 6.5)
    total = distclip.get_total_norm([p.grad for p in halves])
    distclip.clip_grads_with_norm_(halves, 6.5, total)
    assert norm.item() == total.item() == 13.0
    assert gradients(ours) == gradients(halves)
    assert ours[1].grad.tolist() == pytest.approx([2.0, 6.0], rel=1e-6)


def test_value_clipping_by_a_number_and_by_a_pair():
    made = parameters([3.0, -3.0, nan, inf, -inf, 0.1])
    distclip.clip_grad_value_(made, 2.0)
    torch.testing.assert_close(made[0].grad, torch.tensor([2.0, -2.0, nan, 2.0, -2.0, 0.1]), equal_nan=True)
    made = parameters([3.0, -3.0])
    distclip.clip_grad_value_(iter(made), (-1.0, 2.0))
    assert gradients(made) == [[2.0, -1.0]]


@pytest.mark.parametrize("bound", [6.0, 5.0 + 1e-6 + 1e-9, inf])
def test_nothing_is_touched_when_the_coefficient_is_one(bound):
    made = parameters([3.0, -0.0, 1e-42], [4.0])
    before = [p.grad.clone() for p in made]
    versions = [p.grad._version for p in made]
    assert distclip.clip_grad_norm_(made, bound).item() == 5.0
    assert same_bits([before, [p.grad for p in made]])
    assert [p.grad._version for p in made] == versions


def test_an_infinite_bound_leaves_even_a_bad_gradient_as_it_is():
    made = parameters([inf, 1.0], [nan])
    assert torch.isnan(distclip.clip_grad_norm_(made, inf))
    assert same_bits([[p.grad for p in made], [p.grad for p in parameters([inf, 1.0], [nan])]])


def test_a_tied_parameter_counts_once_and_is_scaled_once():
    (tied,) = parameters([3.0, 4.0])
    assert distclip.clip_grad_norm_([tied, tied], 1.0).item() == 5.0
    assert tied.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    distclip.clip_grads_with_norm_([tied, tied], 0.5, torch.tensor(1.0))
    assert tied.grad.tolist() == pytest.approx([0.3, 0.4], rel=2e-6)


def test_one_tensor_an_iterator_a_module_and_modules():
    (one,) = parameters([3.0, 4.0])
    assert distclip.clip_grad_norm_(one, inf).item() == 5.0
    assert distclip.clip_grad_norm_(iter([one]), inf).item() == 5.0
    left, right = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    left.weight.grad, right.weight.grad = torch.full((1, 1), 3.0), torch.full((1, 1), 4.0)
    assert distclip.clip_grad_norm_(nn.Sequential(left, right), inf).item() == 5.0
    assert distclip.clip_grad_norm_([left, right], inf).item() == 5.0
    assert distclip.get_total_norm(one.grad).item() == 5.0


def test_nothing_to_clip_is_a_norm_of_zero():
    for nothing in ([], iter(()), [nn.Parameter(torch.ones(2))]):
        norm = distclip.clip_grad_norm_(nothing, 1.0)
        assert (norm.item(), norm.dtype, norm.shape) == (0.0, torch.float32, ())


def test_mixed_dtypes_keep_theirs_and_float64_makes_the_norm_float64():
    made = [nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.bfloat16, torch.float16, torch.float32)]
    for p in made:
        p.grad = torch.full_like(p, 2.0)
    norm = distclip.clip_grad_norm_(made, 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(12**0.5, rel=1e-7)
    assert [p.grad.dtype for p in made] == [p.dtype for p in made]
    assert distclip.clip_grad_norm_([*made, *parameters([1.0], dtype=torch.float64)], inf).dtype == torch.float64


def test_finite_gradients_beyond_fp32_are_clipped_and_not_zeroed():
    huge = parameters([1e20] * 1000)
    assert distclip.clip_grad_norm_(huge, 1.0).item() == pytest.approx(1e20 * 1000**0.5, rel=1e-6)
    assert true_norm([huge[0].grad]) == pytest.approx(1.0, rel=1e-6)
    (top,) = parameters([torch.finfo(torch.float32).max] * 4)
    assert distclip.clip_grad_norm_([top], 1e3).item() == torch.finfo(torch.float32).max  # the norm is twice that
    assert true_norm([top.grad]) == pytest.approx(1e3, rel=1e-5)
    (half,) = parameters([1000.0] * 10_000, dtype=torch.float16)
    assert distclip.clip_grad_norm_([half], 1.0).item() == pytest.approx(1e5, rel=1e-6)
    assert true_norm([half.grad]) == pytest.approx(1.0, rel=2**-10)


def test_an_overflowing_power_sum_is_said_and_zeroes_nothing():
    made = parameters([2e200, 1.0], dtype=torch.float64)
    assert distclip.clip_grad_norm_(made, 1.0).item() == inf
    assert gradients(made) == [[2e200, 1.0]]
    with pytest.raises(distclip.NonFiniteError, match=r"every gradient is finite but the sum of powers overflows"):
        distclip.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"The total norm of order 10\.0 for gradients .*: every gradient is finite"):
        distclip.clip_grad_norm_(parameters([3e38]), 1.0, 10.0, error_if_nonfinite=True)


@pytest.mark.parametrize("p", [7.5, 8.0])
def test_powers_that_overflow_in_float64_zero_nothing(p):
    """Of the largest fp32 numbers, which p = 7 still holds."""
    made = parameters([3.4e38] * 1000)
    distclip.clip_grad_norm_(made, 1.0, 7.0)
    assert 0 < max(gradients(made)[0]) < 1
    made = parameters([3.4e38] * 1000, [1.0])
    norm = distclip.clip_grad_norm_(made, 1.0, p).item()
    assert norm == (inf if p == 8.0 else torch.finfo(torch.float32).max)
    assert (gradients(made)[1] == [1.0]) == (p == 8.0)


def test_a_small_p_whose_root_overflows_zeroes_nothing():
    made = parameters([1e-3] * 2000)
    assert distclip.clip_grad_norm_(made, 1.0, 0.01).item() == inf  # 2000 ** 100
    assert gradients(made)[0][:2] == pytest.approx([1e-3] * 2)
    with pytest.raises(distclip.NonFiniteError, match="every gradient is finite"):
        distclip.clip_grad_norm_(made, 1.0, 0.01, error_if_nonfinite=True)
    assert distclip.clip_grad_norm_(made, inf, 1 / 4).item() == pytest.approx(1e-3 * 2000.0**4, rel=1e-6)


def test_a_float64_norm_whose_coefficient_leaves_float32_is_clipped():
    made = parameters([3e50, 4e50], [1.0], dtype=torch.float64)
    distclip.clip_grad_norm_(made, 1.0)
    assert gradients(made)[0] == pytest.approx([0.6, 0.8])
    made = parameters([3e50, 4e50], dtype=torch.float64)
    distclip.clip_grads_with_norm_(made, 1.0, torch.tensor(5e50, dtype=torch.float64))
    assert gradients(made)[0] == pytest.approx([0.6, 0.8])


def test_a_model_mostly_on_meta_is_clipped_where_its_gradients_are():
    model = torch.nn.ModuleList([torch.nn.Linear(50, 50, device="meta"), torch.nn.Linear(3, 1)])
    for p in model[1].parameters():
        p.grad = torch.full_like(p, 2.0)
    assert distclip.clip_grad_norm_(model, 1.0).item() == 4.0
    assert distclip.Clipper(model, 1.0).measure().norm.item() == pytest.approx(1.0)


def test_a_gradient_that_is_not_contiguous_and_then_expanded():
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    for step in range(4):
        rows = torch.arange(24.0).view(6, 4).t() if step < 2 else torch.full((1, 6), 3.0).expand(4, 6)
        weight.grad = rows.clone(memory_format=torch.preserve_format) if step < 2 else rows
        true = true_norm([rows])
        assert distclip.clip_grad_norm_([weight], 1.0).item() == pytest.approx(true, rel=1e-6)
        assert true_norm([weight.grad]) == pytest.approx(1.0, rel=1e-6)


def test_float64_gradients_of_float32_parameters_are_not_zeroed():
    model = torch.nn.Linear(2, 1, bias=False)
    clipper = distclip.Clipper(model, 1.0)
    model.double()
    model.weight.grad = torch.tensor([[3e50, 4e50]], dtype=torch.float64)
    assert clipper.clip_().norm.item() == pytest.approx(5e50)
    assert model.weight.grad.tolist()[0] == pytest.approx([0.6, 0.8])


def test_a_parameter_without_a_gradient_hides_none_behind_it():
    made = parameters([1.0], [3.0, -4.0])
    made[0].grad = None
    distclip.clip_grad_value_(made, 2.0)
    assert made[1].grad.tolist() == [2.0, -2.0]
    distclip.clip_grads_with_norm_(made, 1.0, torch.tensor(2.0))
    assert made[1].grad.tolist() == pytest.approx([1.0, -1.0], rel=1e-5)


def test_a_bad_norm_goes_through_the_formula_as_in_torch():
    for bad in (nan, inf, -inf):
        ours, theirs = parameters([bad, 2.0], [1.0]), parameters([bad, 2.0], [1.0])
        distclip.clip_grad_norm_(ours, 1.0)
        torch_clip.clip_grad_norm_(theirs, 1.0)
        assert str(gradients(ours)) == str(gradients(theirs))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize(("bad", "kind"), [(nan, "NaN"), (inf, "inf"), (-inf, "inf")])
def test_error_if_nonfinite_names_the_parameter_and_touches_nothing(p, bad, kind):
    made = parameters([1.0], [2.0, bad], [bad])
    with pytest.raises(distclip.NonFiniteError, match=rf"parameter 1 of shape \(2,\) on rank 0 has {kind}"):
        distclip.clip_grad_norm_(made, 0.1, p, error_if_nonfinite=True)
    assert str(gradients(made)) == str([[1.0], [2.0, bad], [bad]])
    with pytest.raises(RuntimeError, match="The total norm of order"):
        distclip.get_total_norm([p.grad for p in made], p, error_if_nonfinite=True)


BAD_NUMBERS = {
    "max_norm": lambda v: distclip.clip_grad_norm_([], v),
    "norm_type": lambda v: distclip.clip_grad_norm_([], 1.0, v),
    "clip_value": lambda v: distclip.clip_grad_value_([], v),
}


@pytest.mark.parametrize("argument", BAD_NUMBERS)
@pytest.mark.parametrize("value", [0, -1, -0.5, nan, -inf, True, "two", None])
def test_a_bad_number_is_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=argument):
        BAD_NUMBERS[argument](value)


@pytest.mark.parametrize(
    "pair", [(1.0, -1.0), (nan, 1.0), (0.0, 0.0), (1.0, 2.0), (-2.0, -1.0), (1.0,), (-1.0, 2.0, 3.0)]
)
def test_a_bad_pair_of_values_is_refused(pair):
    with pytest.raises(ValueError, match=r"clip_value must be .*min, max"):
        distclip.clip_grad_value_([], pair)


def test_what_is_not_a_parameter_is_refused():
    with pytest.raises(ValueError, match=r"got tuple \(named_parameters\(\)\?\)"):
        distclip.clip_grad_norm_(nn.Linear(1, 1).named_parameters(), 1.0)
    with pytest.raises(ValueError, match="got both"):
        distclip.clip_grad_norm_([nn.Linear(1, 1), torch.ones(1)], 1.0)
    with pytest.raises(ValueError, match=r"group was given but torch\.distributed is not initialised"):
        distclip.clip_grad_norm_([], 1.0, group=object())


def test_gradients_that_are_not_supported_are_refused_before_anything_changes():
    eight_bits = nn.Parameter(torch.zeros(2, dtype=torch.float8_e4m3fn))
    eight_bits.grad = torch.zeros_like(eight_bits)
    with pytest.raises(distclip.LayoutError, match=r"parameter 0 of shape \(2,\) has dtype torch\.float8_e4m3fn"):
        distclip.clip_grad_norm_([eight_bits], 1.0)


def value_clipped(layout) -> tuple[bool, bool]:
    model = layout()
    backward(model, scale=30.0)
    before = whole_gradients(model.parameters())
    with count_collectives() as counts:
        distclip.clip_grad_value_(model.parameters(), (-0.02, 0.01))
    after = whole_gradients(model.parameters())
    expected = [g.clamp(-0.02, 0.01) for g in before]
    return same_tensors(after, expected), same_tensors(after, before) or counts.total() > 0


@pytest.mark.parametrize("layout", [ddp, fsdp2])
def test_shards_clamp_what_they_hold(layout):
    assert run_ranks(value_clipped, 2, layout) == [(True, False)] * 2


def the_two_halves_on_ranks(layout) -> tuple[torch.Tensor, float]:
    model = layout()
    backward(model, scale=30.0)
    norm = distclip.get_total_norm([p.grad for p in model.parameters()])
    distclip.clip_grads_with_norm_(model.parameters(), 0.25, norm)
    return norm, true_norm(whole_gradients(model.parameters()))


@pytest.mark.parametrize("layout", [ddp, fsdp2])
def test_the_two_halves_make_the_whole_on_ranks(layout):
    results = run_ranks(the_two_halves_on_ranks, 2, layout)
    assert same_bits([norm for norm, _ in results])
    assert results[0][0].item() > 1.0
    assert results[0][1] == pytest.approx(0.25, rel=1e-6)


def pending_sum() -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    pending = torch.distributed.tensor.DTensor.from_local(torch.ones(4), mesh, [Partial()])
    messages = []
    for use in (lambda: distclip.clip_grad_value_([whole], 1.0),):
        whole.grad = pending
        try:
            use()
        except distclip.LayoutError as error:
            messages.append(str(error))
    return messages


def test_a_pending_sum_is_never_taken_for_a_gradient():
    for messages in run_ranks(pending_sum, 2):
        assert len(messages) == 1
        assert "a pending sum" in messages[0]


def wrong_gradient_on_one_rank() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    placement = [Shard(1)] if dist.get_rank() else [Shard(0)]
    parameter.grad = torch.distributed.tensor.DTensor.from_local(
        torch.ones(4, 2) if dist.get_rank() else torch.ones(2, 4), mesh, placement, run_check=False
    )
    try:
        distclip.clip_grad_norm_([parameter], 1.0)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_is_an_error_on_all():
    others, own = run_ranks(wrong_gradient_on_one_rank, 2)
    assert own == others
    assert "hold the gradient of one parameter in different placements" in own


def bad_on_one_rank(p: float, bad: float) -> tuple[str, bool]:
    model = fsdp2()
    backward(model)
    if dist.get_rank() == 1:
        model.blocks[1][3].weight.grad._local_tensor[0, 0] = bad
    before = [p.grad._local_tensor.clone() for p in model.parameters()]
    try:
        distclip.clip_grad_norm_(model, 0.1, p, error_if_nonfinite=True)
    except distclip.NonFiniteError as error:
        return str(error), same_bits([before, [p.grad._local_tensor for p in model.parameters()]])
    return "no error", False


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize(("bad", "kind"), [(nan, "NaN"), (inf, "inf")])
def test_error_if_nonfinite_raises_on_every_rank(p, bad, kind):
    results = run_ranks(partial(bad_on_one_rank, p, bad), 3)
    assert len(set(results)) == 1
    message, untouched = results[0]
    assert f"blocks.1.3.weight has {kind} in its reduced gradient, held by rank 1; " in message
    assert untouched


def a_missing_gradient() -> tuple[float, float]:
    model = fsdp2()
    backward(model)
    expected = whole_gradients(model.parameters())
    if dist.get_rank() == 1:  # torch returns a wrong norm or hangs
        for p in model.parameters():
            p.grad = None
    norm = distclip.clip_grad_norm_(model.parameters(), inf).item()
    return norm, true_norm(expected)


def test_a_rank_without_gradients_takes_part_with_zeros():
    (one, whole), (other, _) = run_ranks(a_missing_gradient, 2)
    assert one == other
    assert 0 < one < whole


def first_call_on_many_dtensors(count: int) -> int:
    """The functions that the first call enters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = [nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])) for _ in range(count)]
    for p in made:
        p.grad = torch.ones_like(p)
    with count_entries() as entered:
        norm = distclip.clip_grad_norm_(made, 1.0)
    assert norm.item() == pytest.approx((count * 12) ** 0.5, rel=1e-6)
    return entered[0]


def test_the_first_call_on_2000_dtensors_enters_at_most_50_functions_for_each():
    assert max(run_ranks(first_call_on_many_dtensors, 2, 2000)) < 50 * 2000


def unsharded_copies() -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    torch.distributed.fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model(torch.zeros(2, 6, dtype=torch.long))  # no backward: the module now shows unsharded copies
    said = []
    try:
        distclip.clip_grad_norm_(model.parameters(), 1.0)
    except distclip.LayoutError as error:
        said.append(str(error))
    backward(model)
    whole = true_norm(whole_gradients(model.parameters()))
    model(torch.zeros(2, 6, dtype=torch.long))
    said.append(abs(distclip.clip_grad_norm_(model, inf).item() / whole - 1) < 1e-6)
    said.append(isinstance(next(model.parameters()), torch.distributed.tensor.DTensor))
    return said


def test_unsharded_copies_are_never_taken_for_parameters():
    for said, *rest in run_ranks(unsharded_copies, 2):
        assert "is an unsharded copy, which FSDP2 shows between forward and backward" in said
        assert rest == [True, True]


def payloads() -> list[int]:
    """Lengths of every message that the functions send for FSDP2, for DTensors cut by hand, and for inf."""
    sizes = []
    plain = distclip.ranks.message.all_reduce

    def spy(group, message, *op):
        sizes.append(message.numel())
        return plain(group, message, *op)

    distclip.ranks.message.all_reduce = spy
    model = fsdp2()
    backward(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    by_hand = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    for what in (model.parameters(), model, [by_hand]):
        distclip.clip_grad_norm_(what, 1.0)
    distclip.clip_grad_norm_(model, 1.0, inf)
    distclip.clip_grad_norm_([], 1.0, group=dist.group.WORLD)
    return sizes


def test_two_numbers_travel_for_inf_three_and_two_more_where_they_are_needed():
    assert run_ranks(payloads, 2, fresh=True) == [[2, 2, 4, 3, 4]] * 2


def test_complex_gradients_have_the_norm_of_their_moduli():
    for p in (0.5, 1.0, 2.0, 3.0, inf):
        wave = nn.Parameter(torch.zeros(1000, dtype=torch.complex64))
        wave.grad = torch.randn(1000, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
        expected = true_norm([wave.grad.abs().double()], p)
        assert distclip.clip_grad_norm_([wave], expected / 2, p).item() == pytest.approx(expected, rel=2e-7)
        assert true_norm([wave.grad.abs()], p) == pytest.approx(expected / 2, rel=1e-6)
    distclip.clip_grad_value_([wave], 1e-3)
    assert torch.view_as_real(wave.grad).abs().max().item() == pytest.approx(1e-3)


def test_sparse_gradients_are_coalesced_and_never_densified():
    table, dense = nn.Embedding(1000, 4, sparse=True), nn.Embedding(1000, 4)
    dense.load_state_dict(table.state_dict())
    for model in (table, dense):
        model(torch.tensor([1, 1, 5, 7])).square().sum().backward()
    assert not table.weight.grad.is_coalesced()
    expected = true_norm([dense.weight.grad])
    assert distclip.get_total_norm([table.weight.grad]).item() == pytest.approx(expected, rel=2e-7)
    assert distclip.clip_grad_norm_(table.parameters(), 1.0).item() == pytest.approx(expected, rel=2e-7)
    assert table.weight.grad.is_sparse
    assert table.weight.grad._values().shape == (3, 4)
    assert true_norm([table.weight.grad.to_dense()]) == pytest.approx(1.0, rel=1e-6)
    optimizer = torch.optim.SparseAdam(table.parameters())
    assert distclip.Clipper(table, 0.5).step(optimizer).norm.item() == pytest.approx(1.0, rel=1e-6)
    table.weight.grad = None
    table(torch.tensor([1, 1])).square().sum().backward()
    distclip.clip_grad_value_(table.parameters(), (-1e-3, 2e-3))
    assert table.weight.grad.to_dense().abs().max().item() == pytest.approx(2e-3)


def test_the_functions_can_stand_in_for_torchs(monkeypatch):
    for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(nn.utils, name, getattr(distclip, name))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        backward(model, step, scale=30.0)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0, norm_type=2, error_if_nonfinite=True)
        assert float(norm) > 1.0
        assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(1.0, rel=1e-6)
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, torch.tensor(1.0), foreach=True)
        nn.utils.clip_grad_value_(model.parameters(), clip_value=0.01)
        optimizer.step()
        optimizer.zero_grad()
