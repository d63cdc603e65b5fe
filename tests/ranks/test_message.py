"""Numbers on the host and 0-d tensors on an accelerator are two roads to the same result."""

from math import copysign, inf, isnan, nan, nextafter

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip.policies.coefficient import LEAST, clip_coef, clip_coef_on_device, presented, presented_on_device
from distclip.ranks.group import ClippingGroup
from distclip.ranks.message import reduce_norm
from support.ranks import same_bits
from support.simulated import simulate

TINY, HUGE = (1e-320, 1e-300, 1e-40, 1e-12), (1e20, 3.4e38, 1e39, 1e160, 1.7e308)
NORMS = (0.0, *TINY, 0.1, 0.3, 0.99, 1.0, 1.01, 7.3, 1e6 / 3, *HUGE, inf, nan)
BOUNDS = (1e-50, 1e-30, 0.1, 0.3, 1.0, 7.3, 3.4e38, 1e39, 1e200, inf)
FLOAT32_MAX = torch.finfo(torch.float32).max


def scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def coef_on_device(norm: float, bound: float) -> Tensor:
    return clip_coef_on_device(scalar(norm), bound, torch.float32)


@pytest.mark.parametrize("bound", BOUNDS[:-1])
def test_the_coefficient_has_the_same_bits_from_numbers_and_from_tensors(bound):
    """As far as it is normal: the accelerator does not ask whether several factors would be needed."""
    for norm in NORMS:
        coefs = [clip_coef(norm, bound).clamp(min=LEAST), coef_on_device(norm, bound)]
        assert same_bits(coefs), norm
        assert coefs[0].dtype == coefs[1].dtype == torch.float32
        assert coefs[0].shape == coefs[1].shape == ()


@pytest.mark.parametrize("bound", BOUNDS[:-1])
def test_the_coefficient_is_that_of_torchs_formula(bound):
    for norm in NORMS:
        coef = clip_coef(norm, bound).item()
        if isnan(norm):
            assert isnan(coef)
        else:
            assert coef == torch.tensor(min(1.0, bound / (norm + 1e-6)), dtype=torch.float32).item()


@pytest.mark.parametrize("bound", [0.1, 1.0, 7.3, 1e6, 3.4e38])
def test_the_coefficient_is_exactly_one_as_far_as_the_bound_and_less_beyond_it(bound):
    """As far as the bound less the 1e-6 of torch's formula, which is nothing beside large ones."""
    edge = bound - 1e-6
    for norm in (0.0, edge / 2, nextafter(edge, 0.0)):
        assert clip_coef(norm, bound).item() == coef_on_device(norm, bound).item() == 1.0
    for norm in (bound * (1 + 1e-6) + 1e-6, 2 * bound, 1e200):
        assert clip_coef(norm, bound).item() < 1.0
        assert coef_on_device(norm, bound).item() < 1.0


def test_an_infinite_bound_is_a_coefficient_of_one_whatever_the_norm():
    for norm in NORMS:
        assert clip_coef(norm, inf).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_presented_norm_has_the_same_bits_from_a_number_and_from_a_tensor(dtype):
    edges = (FLOAT32_MAX, nextafter(FLOAT32_MAX, inf), FLOAT32_MAX * (1 + 2**-25), 2 * FLOAT32_MAX)
    for norm in (*NORMS, *edges, torch.finfo(torch.float64).max):
        norms = [presented(norm, dtype), presented_on_device(scalar(norm), scalar(norm) < inf, dtype)]
        assert same_bits(norms), norm
        assert norms[0].dtype == dtype
        shown = norms[0].item()
        if isnan(norm) or norm == inf:
            assert same_bits([shown, norm])
        elif dtype == torch.float64:
            assert shown == norm
        elif norm > FLOAT32_MAX:
            assert shown == FLOAT32_MAX
        else:
            assert shown == torch.tensor(norm).item()


def are_as_good_as_the_same(number: float, tensor: float) -> bool:
    """One bit of float64 may differ: torch's own square root on the CPU is not always the nearest number."""
    return same_bits([number, tensor]) or abs(number - tensor) <= 2**-52 * number


POWERS = ((1.0, 2.0, 3.0), (0.0, 0.0, 0.0), (1e-300, 1e300, 0.1), (5e-324, 0.0, 0.0), (1.0, inf, 2.0), (nan, 1.0, 1.0))
MORE_POWERS = ((1.0, nan, inf), (inf, 3.0, nan), (1.7e308, 1.7e308, 1.7e308))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("sums", [*POWERS, *MORE_POWERS])
@pytest.mark.parametrize(("odd", "faulty"), [(None, None), (1, None), (None, 2)], ids=["agree", "odd", "faulty"])
def test_reduced_norms_are_the_same_from_numbers_and_from_tensors(sums, p, odd, faulty):
    def use(group, made) -> tuple[float, bool, list[bool]]:
        rank = group.rank
        code, asked = 7 if rank != odd else 8, [rank == 1, False, True]
        return reduce_norm(group, made(sums[rank]), p, code, rank == faulty, asked).read()

    numbers = simulate(lambda group: use(group, float), 3, collectives=1)
    tensors = simulate(lambda group: use(group, scalar), 3, collectives=1)
    assert same_bits(numbers)
    assert same_bits(tensors)
    assert tensors[0][1:] == numbers[0][1:]
    norm, disagree, answers = numbers[0]
    assert isnan(tensors[0][0]) if disagree else are_as_good_as_the_same(norm, tensors[0][0])
    assert disagree == (odd is not None or faulty is not None)
    assert answers == [True, False, True]
    if any(map(isnan, sums)):
        assert isnan(norm)
    elif p == inf:
        assert norm == max(sums)
    elif p < 1 and sum(sums) > 1e154:
        assert norm == inf
    else:
        assert norm == pytest.approx(sum(sums) ** (1 / p), rel=1e-14)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize("total", [0.0, 5e-324, 1e-300, 0.3, 2.0, 1e100, 1.7e308, inf, nan])
def test_the_norm_of_one_process_is_the_same_from_a_number_and_from_a_tensor(total, p):
    made = [reduce_norm(ClippingGroup.alone(), own, p, 5, False, [True, False]) for own in (total, scalar(total))]
    assert isinstance(made[0].norm, float)
    assert isinstance(made[1].norm, Tensor)
    assert are_as_good_as_the_same(*(reduced.read()[0] for reduced in made))
    assert [reduced.read()[1:] for reduced in made] == [(False, [True, False])] * 2


@pytest.mark.parametrize(("norm", "bound"), [(1e60, 1e39), (1e150, 1e140), (1e20, 0.3), (3.0, 0.1)])
def test_the_two_halves_clip_alike_by_any_bound(norm, bound):
    """A bound beyond float32 is no infinite bound, and one that float32 rounds is not another bound."""
    halves, whole = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    for p in (halves, whole):
        p.grad = torch.tensor([norm], dtype=torch.float64)
    distclip.clip_grads_with_norm_([halves], bound, distclip.get_total_norm([halves.grad]))
    distclip.clip_grad_norm_([whole], bound)
    assert same_bits([halves.grad, whole.grad])
    assert whole.grad.item() != norm


EDGES = (0.0, -0.0, 5e-324, 1.0, nextafter(1.0, 2.0), 1.7e308, inf, nan, copysign(nan, -1))


@pytest.mark.parametrize("made", [float, scalar])
@pytest.mark.parametrize("first", EDGES)
@pytest.mark.parametrize("second", EDGES)
def test_the_largest_norm_is_found_among_all_floats_whatever_their_signs(first, second, made):
    found = simulate(lambda group: reduce_norm(group, made((first, second)[group.rank]), inf, 5, False, ()).read(), 2)
    assert same_bits(found)
    norm, disagree, _ = found[0]
    assert not disagree
    if isnan(first) or isnan(second):
        assert isnan(norm)
    else:
        assert (norm, copysign(1, norm)) == (max(first, second), 1)
