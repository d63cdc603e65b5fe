"""The table of the README: what torch.nn.utils does with a layout or a number, and what distclip does with the same.

What is asserted of torch was measured with 2.13 on the CPU with Gloo; with another version only our half is checked.
"""

import re
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from support import parallel
from support.entries import count_entries
from support.layouts import backward, ddp, fsdp2, fsdp2_and_plain, fsdp2_bf16_parameters
from support.oracle import true_norm, whole_gradients
from support.parallel import united
from support.ranks import RankError, run_ranks, same_bits

MEASURED_TORCH = torch.__version__.startswith("2.13")
torch_clip = nn.utils.clip_grad_norm_
ours_clip = distclip.clip_grad_norm_


def outcome(use: Callable[[], object]) -> object:
    """The number that ``use`` returned, or the error it raised."""
    try:
        result = use()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return result.item() if isinstance(result, torch.Tensor) else result


def both(build_model: Callable[[], nn.Module], norm_type: float, change: Callable[[nn.Module], None] | None) -> tuple:
    """(torch's norm, our norm, the oracle) of one backward; ``change`` edits the gradients first."""
    model = build_model()
    backward(model, scale=30.0)
    oracle = true_norm(whole_gradients(model.parameters()), norm_type)
    if change is not None:
        change(model)
    ours = outcome(lambda: ours_clip(model.parameters(), inf, norm_type))
    torchs = outcome(lambda: torch_clip(model.parameters(), inf, norm_type))
    return torchs, ours, oracle


def test_dtensor_and_plain_parameters():
    for torchs, ours, oracle in run_ranks(both, 2, fsdp2_and_plain, 2.0, None):
        assert ours == pytest.approx(oracle, rel=2e-7)
        if MEASURED_TORCH:
            assert "got mixed torch.Tensor and DTensor" in torchs


def test_inf_norm_on_fsdp2():
    results = run_ranks(both, 2, fsdp2, inf, None)
    assert same_bits([ours for _, ours, _ in results])
    assert results[0][1] == pytest.approx(results[0][2], rel=1e-7)
    if MEASURED_TORCH:
        assert results[0][0] != results[1][0]


def nan_on_rank_1(model: nn.Module) -> None:
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local()[0, 0] = nan


def inf_norm_with_nan(clip: str) -> object:
    model = fsdp2()
    backward(model)
    nan_on_rank_1(model)
    function = ours_clip if clip == "ours" else torch_clip
    return outcome(lambda: function(model.parameters(), 1.0, inf, error_if_nonfinite=True))


def test_inf_norm_with_nan_on_one_rank():
    for said in run_ranks(inf_norm_with_nan, 2, "ours"):
        assert said.startswith("NonFiniteError")
        assert "has NaN in its reduced gradient, held by rank 1; " in said
    if MEASURED_TORCH:
        rank_0, _ = run_ranks(inf_norm_with_nan, 2, "torch")
        assert isinstance(rank_0, float), "torch raised"


def drop_gradients_of_rank_1(model: nn.Module) -> None:
    if dist.get_rank() == 1:
        model.zero_grad()


def rank_without_gradients(clip: str) -> object:
    model = fsdp2()
    backward(model)
    drop_gradients_of_rank_1(model)
    return outcome(lambda: (ours_clip if clip == "ours" else torch_clip)(model.parameters(), 1.0))


def test_a_rank_without_gradients():
    first, second = run_ranks(rank_without_gradients, 2, "ours")
    assert first == second > 0
    if MEASURED_TORCH:
        with pytest.raises(RankError, match="rank 0: did not finish; rank 1: finished"):
            run_ranks(rank_without_gradients, 2, "torch", timeout=5, fresh=True)


def test_one_fp32_tensor_of_1e8_elements():
    parameter = nn.Parameter(torch.zeros(10**8))
    chunk = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    parameter.grad = chunk.repeat(100)
    oracle = 10 * true_norm([chunk])
    assert ours_clip([parameter], inf).item() == pytest.approx(oracle, rel=2e-7)
    if MEASURED_TORCH:
        assert torch_clip([parameter], inf).item() / oracle - 1 < -1e-3


def finite_and_huge(clip: Callable[..., object]) -> float:
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.full((1000,), 1e20)
    clip([parameter], 1.0)
    return parameter.grad.double().norm().item()


def test_finite_gradients_of_1e20():
    assert finite_and_huge(ours_clip) == pytest.approx(1.0, rel=1e-6)
    if MEASURED_TORCH:
        assert finite_and_huge(torch_clip) == 0.0, "torch zeroes them all"


def fp16_shards(clip: str) -> tuple[float, float, float]:
    """(the norm, the oracle, the norm afterwards) with a bound far above it."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(100, 100, dtype=torch.float16), mesh, [Shard(0)]))
    whole = torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).mul(5.68).half()
    parameter.grad = distribute_tensor(whole, mesh, [Shard(0)])
    norm = (ours_clip if clip == "ours" else torch_clip)([parameter], 1e3)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norm.item(), true_norm([whole]), true_norm(whole_gradients([parameter]))


def test_fp16_shards_of_norm_568():
    for norm, oracle, after in run_ranks(fp16_shards, 2, "ours"):
        assert oracle == pytest.approx(568, rel=0.02)
        assert norm == pytest.approx(oracle, rel=2e-7)
        assert after == oracle
    if MEASURED_TORCH:
        for norm, _, after in run_ranks(fp16_shards, 2, "torch"):
            assert (norm, after) == (inf, 0.0)


def test_fsdp2_with_bf16_gradients():
    for torchs, ours, oracle in run_ranks(both, 2, fsdp2_bf16_parameters, 2.0, None):
        assert ours == pytest.approx(oracle, rel=2e-7)
        if MEASURED_TORCH:
            assert abs(torchs / oracle - 1) > 1e-4


def corrupt_replica(clip: str) -> tuple[float, bool]:
    """(the norm of this rank, whether it went on to step) with a NaN that only rank 1 holds, under DDP."""
    model = ddp()
    clipper = distclip.Clipper(model, 1.0)
    backward(model)
    if dist.get_rank() == 1:
        next(model.parameters()).grad[0, 0] = nan
    if clip == "ours":
        report = clipper.clip_()
        return report.norm.item(), not report.skip.item()
    norm = torch_clip(model.parameters(), 1.0).item()
    return norm, norm == norm


def test_nan_in_one_ddp_replica():
    assert [stepped for _, stepped in run_ranks(corrupt_replica, 2, "ours")] == [False, False]
    if MEASURED_TORCH:
        assert [stepped for _, stepped in run_ranks(corrupt_replica, 2, "torch")] == [True, False]


def first_call(clip: str, count: int) -> int:
    """The functions that the first call on ``count`` small DTensors enters."""
    mesh = init_device_mesh("cpu", (2,))
    made = [nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    with count_entries() as entered:
        (ours_clip if clip == "ours" else torch_clip)(made, 1.0)
    return entered[0]


def test_the_first_call_on_many_dtensors():
    few, many = (max(run_ranks(first_call, 2, "ours", count)) for count in (100, 200))
    assert many < 2.2 * few
    if MEASURED_TORCH:
        theirs, more = (max(run_ranks(first_call, 2, "torch", count, fresh=True)) for count in (100, 200))
        assert theirs > 10 * few
        assert more > 2.8 * theirs  # it grows with the square of their number


def job_norms(layout, norm_type: float = 2.0) -> tuple[object, object, object, float]:
    """(torch's norm, ours of bare parameters, ours of the parts with the layout's options, the oracle)."""
    job = layout(torch.float32, 30.0)
    job.backward()
    oracle = true_norm(united(job), norm_type)
    ours = outcome(lambda: ours_clip(job.parts, inf, norm_type, **job.options))
    bare = outcome(lambda: ours_clip(job.parameters(), inf, norm_type))
    torchs = outcome(lambda: torch_clip(job.parameters(), inf, norm_type))
    return torchs, bare, ours, oracle


def test_fsdp2_with_tensor_parallel():
    for torchs, bare, ours, oracle in run_ranks(job_norms, 4, parallel.fsdp2_tp):
        assert bare == ours == pytest.approx(oracle, rel=2e-7)
        if MEASURED_TORCH:
            assert "must have the same mesh" in torchs


def test_tensor_parallel_with_plain_norm_layers():
    for torchs, bare, ours, oracle in run_ranks(job_norms, 2, parallel.tp):
        assert bare == ours == pytest.approx(oracle, rel=2e-7)
        if MEASURED_TORCH:
            assert "got mixed torch.Tensor and DTensor" in torchs


def test_pipeline_stages():
    for torchs, _, ours, oracle in run_ranks(job_norms, 2, parallel.pp_gpipe):
        assert ours == pytest.approx(oracle, rel=2e-7)
        if MEASURED_TORCH:
            assert torchs < 0.99 * oracle, "torch returns the norm of the stage"


def test_fsdp1():
    for torchs, bare, ours, oracle in run_ranks(job_norms, 2, parallel.fsdp1_full):
        assert ours == pytest.approx(oracle, rel=2e-7)
        assert "is managed by FSDP1" in bare, "never the local norm"
        if MEASURED_TORCH:
            assert torchs < 0.99 * oracle, "torch returns the norm of what the rank holds"


def sparse_norm(clip: Callable[..., torch.Tensor]) -> object:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 1, 5])).sum().backward()
    return outcome(lambda: clip(table.parameters(), inf))


def test_sparse_gradients():
    assert sparse_norm(ours_clip) == pytest.approx((4 * 4 + 4) ** 0.5)
    if MEASURED_TORCH:
        assert "Could not run" in sparse_norm(torch_clip)


def listed_twice(clip: Callable[..., object]) -> tuple[float, float]:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    return clip([parameter, parameter], 1.0).item(), parameter.grad.norm().item()


def test_a_parameter_listed_twice():
    assert listed_twice(ours_clip) == (5.0, pytest.approx(1.0, rel=1e-6))
    if MEASURED_TORCH:
        norm, after = listed_twice(torch_clip)
        assert norm == pytest.approx(50**0.5)
        assert after == pytest.approx(0.1)


def test_a_negative_bound():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        ours_clip([parameter], -1.0)
    assert parameter.grad.tolist() == [3.0, 4.0]
    if MEASURED_TORCH:
        torch_clip([parameter], -1.0)
        assert parameter.grad[0].item() < 0, "torch turns the gradients round"


def test_the_readme_shows_what_is_tested_here():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.findall(r"^\|.*`(test_\w+)` *\|$", readme, re.MULTILINE)
    proofs = {name for name in globals() if name.startswith("test_")} - {"test_the_readme_shows_what_is_tested_here"}
    assert set(shown) == proofs
