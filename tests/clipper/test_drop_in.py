"""In the place of torch's functions: what people match on, what torch's own tests ask for, and where FSDP1 is whole."""

import warnings
from itertools import pairwise, product
from math import inf, nan

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import distclip
from support.oracle import true_norm, whole_gradients
from support.ranks import count_collectives, run_ranks, same_bits


def parameters_with(scalar: float, only_one: bool, prefixed: bool) -> list[torch.Tensor]:
    weight, first = nn.Parameter(torch.ones(10, dtype=torch.float64)), nn.Parameter(torch.ones(1, dtype=torch.float64))
    (weight[1] if only_one else weight).mul(scalar).sum().backward()
    first.sum().backward()
    return [first, weight] if prefixed else [weight]


@pytest.mark.parametrize("norm_type", [0.1, 1, 2, 3.5, inf])
def test_errors_of_a_norm_that_is_not_finite_begin_as_torchs_and_come_where_torchs_come(norm_type):
    for scalar, only_one, prefixed in product([inf, -inf, nan, 2e22, 2e200], [True, False], [True, False]):
        outcomes = []
        for clip in (torch.nn.utils.clip_grad_norm_, distclip.clip_grad_norm_):
            parameters = parameters_with(scalar, only_one, prefixed)
            before = whole_gradients(parameters)
            try:
                clip(parameters, 1, norm_type, error_if_nonfinite=True)
                outcomes.append("")
            except RuntimeError as error:
                outcomes.append(str(error))
                assert all(
                    a.equal(b) or a.isnan().any() for a, b in zip(before, whole_gradients(parameters), strict=True)
                )
        torchs, ours = outcomes
        assert bool(ours) == bool(torchs)
        assert ours.startswith(torchs.partition(". To disable")[0])
        assert ours.endswith(torchs.rpartition(", set ")[2])


def test_the_error_of_a_clipper_begins_alike_and_says_its_own_way_out():
    net = nn.Linear(2, 1)
    net.weight.grad = torch.tensor([[1.0, nan]])
    clipper = distclip.Clipper(net, 1.0, nonfinite="raise")
    with pytest.raises(distclip.NonFiniteError) as caught:
        clipper.clip_()
    assert str(caught.value).startswith(
        "The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped: weight on "
    )
    assert str(caught.value).endswith("nonfinite='skip'")


def test_a_generator_that_is_used_up_warns_as_torchs_does():
    used_up = nn.Linear(2, 1).parameters()
    list(used_up)
    torchs = [torch.nn.utils.clip_grad_norm_] if torch.__version__ >= (2, 7) else []  # torch 2.6 says nothing
    for clip in [*torchs, distclip.clip_grad_norm_]:
        with pytest.warns(UserWarning, match="^`parameters` is an empty generator") as caught:
            assert clip(used_up, 1.0).item() == 0.0
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distclip.clip_grad_norm_([], 1.0)


def fsdp1(strategy: ShardingStrategy, orig: bool, sizes: tuple[int, ...] = (3, 4, 2), bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NO_SHARD is deprecated, and there is no GPU
        model = FullyShardedDataParallel(
            nn.Sequential(*layers), sharding_strategy=strategy, use_orig_params=orig, device_id=torch.device("cpu")
        )
    torch.manual_seed(dist.get_rank())
    model(torch.randn(5, sizes[0])).square().sum().backward()
    return model


def clipped_without_its_module(strategy: ShardingStrategy, orig: bool, sizes: tuple[int, ...], bias: bool):
    by_torch, model = fsdp1(strategy, orig, sizes, bias), fsdp1(strategy, orig, sizes, bias)
    expected = torch.nn.utils.clip_grad_norm_(by_torch.parameters(), 0.5)
    oracle = true_norm(whole_gradients(model.parameters()))
    try:
        with count_collectives() as counts:
            norm = distclip.clip_grad_norm_(model.parameters(), 0.5)
    except distclip.LayoutError as error:
        return str(error)
    pairs = zip(by_torch.parameters(), model.parameters(), strict=True)
    return norm, expected, oracle, counts.total(), all(torch.allclose(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("size", [2, 3])
def test_flat_parameters_of_fsdp1_under_no_shard_are_whole_and_need_no_module(size):
    results = run_ranks(clipped_without_its_module, size, ShardingStrategy.NO_SHARD, False, (3, 4, 2), True)
    assert same_bits([norm for norm, *_ in results])
    for norm, expected, oracle, collectives, alike in results:
        assert norm.item() == pytest.approx(oracle, rel=2e-7)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert norm > 0.5
        assert collectives == 0
        assert alike


@pytest.mark.parametrize("sizes", [(3, 4, 2), (1, 1)])  # a part of one element looks like the whole
@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP])
def test_flat_parameters_that_are_cut_still_need_their_module(strategy, sizes):
    for said in run_ranks(clipped_without_its_module, 2, strategy, False, sizes, sizes != (1, 1)):
        assert "clip_grad_norm_(model, max_norm)" in said


@pytest.mark.parametrize("strategy", [ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD])
def test_original_parameters_of_fsdp1_do_not_tell_and_the_error_has_the_line_to_write(strategy):
    for said in run_ranks(clipped_without_its_module, 2, strategy, True, (3, 4, 2), True):
        assert "NO_SHARD" in said
        assert "clip_grad_norm_(model, max_norm)" in said
