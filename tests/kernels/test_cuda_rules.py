"""CUDA's rules where the CPU's are others: that the stand-in device has them, and that the library keeps to them.

docs/explanation/cuda.md lists the rules, each with its place in torch's source.
"""

from math import inf
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip.kernels import foreach, scale_
from distclip.kernels.transfer import Transfer
from distclip.ranks.group import ClippingGroup
from distclip.train.trainer import Trainer
from distclip.train.ways.zero import Zero
from promises.test_accelerator import POLICIES, adamw, fill, model_of, on_the_accelerator
from support.accelerator import (
    DEVICE,
    EXISTS,
    Event,
    Wait,
    counted_launches,
    counted_waits,
    current_device,
    largest_tensor,
    no_waits,
    pinned_like,
    raw,
    use_accelerator,
)
from support.oracle import true_norm
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")

COEF = 0.088034  # 0.0879 in bf16, 0.0880 in fp16
HALF = (torch.bfloat16, torch.float16)


def here(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The stand-in


def products() -> list[tuple[bool, ...]]:
    """Whether a product is that with the factor rounded to the tensor's dtype, or the one rounded once."""
    use_accelerator()
    found = []
    for dtype in HALF:
        x, coef = noise(1000, dtype=dtype), torch.tensor(COEF)
        rounded, once = x * coef.to(dtype), (x.float() * coef).to(dtype)
        products = [here(x).mul_(f) for f in (here(coef), coef, here(coef).view(1))]
        products.append(here(x))
        torch._foreach_mul_(products[-1:], here(coef))
        found += [(torch.equal(raw(y), rounded), torch.equal(raw(y), once)) for y in products]
    return found


def test_a_number_on_the_device_takes_the_dtype_of_the_tensor_that_it_multiplies(seen):
    """Loops.cuh: BinaryFunctor<scalar_t, scalar_t, ...> loads both operands as the common dtype."""
    rounded, once = (True, False), (False, True)
    assert seen["products"] == [rounded, once, once, rounded] * 2


def routes() -> dict[str, int]:
    """Kernels launched for one tensor each by calls for eight."""
    use_accelerator()
    same = [here(noise(4, 4)) for _ in range(8)]
    half = [here(noise(4, 4, dtype=torch.bfloat16)) for _ in range(8)]
    mixed, gaps = same[:4] + half[:4], [here(noise(8, 4))[::2] for _ in range(8)]
    factor, norm = here(torch.tensor(0.5)), torch._foreach_norm
    calls = {
        "norm": lambda: norm(same, 2.0, torch.float64),
        "inf": lambda: norm(half, inf, torch.float64),
        "p = 3": lambda: norm(same, 3.0, torch.float64),
        "dtypes": lambda: norm(mixed, 2.0, torch.float64),
        "gaps": lambda: norm(gaps, 2.0, torch.float64),
        "complex": lambda: norm([here(noise(4) + 0j) for _ in range(8)], 2.0, torch.complex128),
        "mul": lambda: torch._foreach_mul_(same, factor),
        "mul by a number of the host": lambda: torch._foreach_mul_(half, 0.5),
        "mul by another dtype": lambda: torch._foreach_mul_(half, factor),
        "mul of gaps": lambda: torch._foreach_mul_(gaps, factor),
        "clamp": lambda: torch._foreach_clamp_min_(half, -1.0),
        "clamp of dtypes": lambda: torch._foreach_clamp_min_(mixed, -1.0),
        "copy between dtypes": lambda: torch._foreach_copy_(same, half),
        "copy of gaps": lambda: torch._foreach_copy_(same, gaps),
    }
    found = {}
    for name, call in calls.items():
        with counted_launches() as launches:
            call()
        found[name] = len([launch for launch in launches if "copy_from" not in launch or "copy" in name])
    return found


def test_a_list_of_one_dtype_without_gaps_takes_the_fast_route(seen):
    """ForeachUtils.h: can_use_fast_route; ForeachReduceOp.cu: use_slowpath; ForeachBinaryOpScalarTensor.cu."""
    found = seen["routes"]
    assert {name for name, launches in found.items() if not launches} == {
        *("norm", "inf", "mul", "mul by a number of the host", "clamp", "copy between dtypes")
    }
    assert all(launches >= 8 for launches in found.values() if launches)


def waiting() -> dict[str, object]:
    use_accelerator()
    x, number, flags = here(torch.arange(6.0)), torch.tensor(2.0), here(torch.ones(6)) > 0
    calls = {
        "where": lambda: torch.where(flags, number, x),
        "where, condition": lambda: torch.where(number > 1, x, x),
        "select": lambda: x.masked_select(flags),
        "unique": lambda: x.unique(),
        "pageable": lambda: torch.zeros(6).copy_(x, non_blocking=True),
        "mul": lambda: number * x,
        "compare": lambda: x < number,
        "fill": lambda: x.fill_(number),
        "pinned": lambda: pinned_like(x).copy_(x, non_blocking=True),
        "where, numbers": lambda: torch.where(flags, 0.0, x),
        "stack": lambda: torch.stack([x[0], number]),
        "clamp": lambda: x.clamp(number, number),
    }
    found: dict[str, object] = {}
    for name, call in calls.items():
        try:
            with no_waits():
                call()
            found[name] = "free"
        except Wait:
            found[name] = "waits"
        except RuntimeError:
            found[name] = "refused"
    return found


def test_numbers_of_the_host_travel_with_kernels_of_two_operands_and_are_copied_for_where(seen):
    """TensorCompare.cpp: where_self_out; TensorIterator: allow_cpu_scalars; Copy.cu: memcpy_and_sync."""
    found = seen["waiting"]
    assert {name for name, what in found.items() if what == "waits"} == {
        *("where", "where, condition", "select", "unique", "pageable")
    }
    assert {name for name, what in found.items() if what == "refused"} == {"stack", "clamp"}


def events() -> list[float]:
    """What has arrived on the host, by how the event was recorded while another device was current."""
    use_accelerator()
    x, found = here(torch.ones(1)), []
    for stream in (None, torch.accelerator.current_stream(x.device)):
        host = pinned_like(x)
        host.copy_(x, non_blocking=True)
        event = Event(DEVICE)
        with current_device(1):
            event.record(stream)
        found.append(host.item())
        event.synchronize()
        found.append(host.item())
    return found


def test_an_event_records_on_the_current_device_unless_it_is_told_a_stream(seen):
    """torch/csrc/Event.cpp: THPEvent_record."""
    assert seen["events"] == [0.0, 0.0, 0.0, 1.0]


def unscaled() -> list[bool | str]:
    use_accelerator()
    found: list[bool | str] = []
    for dtype in (torch.float32, *HALF):
        x, coef = noise(100, dtype=dtype), torch.tensor(COEF)
        y = here(x)
        try:
            torch._amp_foreach_non_finite_check_and_unscale_([y], here(torch.zeros(())), here(coef))
            found.append(torch.equal(raw(y), (x.float() * coef).to(dtype)))
        except NotImplementedError as error:
            found.append(str(error))
    return found


def test_the_kernel_of_gradscaler_has_no_bf16(seen):
    """AmpKernels.cu: AT_DISPATCH_FLOATING_TYPES_AND_HALF (pytorch#127176)."""
    single, bfloat16, half = seen["unscaled"]
    assert single is half is True
    assert "not implemented" in bfloat16


def converted() -> list[int]:
    use_accelerator()
    sizes = []
    x = here(noise(1000))
    for call in (
        lambda: torch.linalg.vector_norm(x, 2, dtype=torch.float64),
        lambda: torch._foreach_norm([x], 2, torch.float64),
        lambda: x.view(torch.int32).sum(dtype=torch.int64),
    ):
        with largest_tensor() as size:
            call()
        sizes += size
    return sizes


def test_a_sum_in_another_dtype_converts_a_copy_first(seen):
    """ReduceOpsUtils.h: make_reduction(self.to(in_dtype)); not so in the kernels of ForeachReduceOp.cu."""
    norm, together, total = seen["converted"]
    assert (norm, total) == (8000, 8000)
    assert together == 8


# The library


def late_flags() -> list[list[float]]:
    """What was sent is read, by which device is current."""
    found = []
    with on_the_accelerator():
        for current in (0, 1):
            with current_device(current):
                found.append(Transfer.begin(here(torch.tensor([3.0])).double(), here(torch.tensor(True))).read())
    return found


def test_late_flags_have_arrived_when_they_are_read_whatever_device_is_current(seen):
    assert seen["late_flags"] == [[3.0, 1.0]] * 2


def norms() -> list[tuple[float, float, int, int]]:
    """Norm, the right one, the largest tensor made, and kernels launched for one tensor, by what is summed."""
    use_accelerator()
    found = []
    both = [noise(50, 40, seed=i, dtype=d) for i, d in enumerate((torch.float32, torch.bfloat16) * 4)]
    large, pairs = [noise(3000, 2000)], [torch.complex(noise(3000, 2000), noise(3000, 2000, seed=1))]
    for tensors, p in ((both, 2.0), (both, inf), (large, 3.0), (large, 2.5), (pairs, 2.0), (pairs, 1.0)):
        moved = list(map(here, tensors))
        with largest_tensor() as size, counted_launches() as launches, no_waits():
            each = foreach.norms(moved, p)
        total = torch.linalg.vector_norm(torch.stack(list(map(raw, each))), p).item()
        moduli = [t.to(torch.complex128).abs() if t.is_complex() else t for t in tensors]
        found.append((total, true_norm(moduli, p), size[0], len(launches)))
    return found


def test_norms_are_taken_by_dtype_and_no_copy_is_as_large_as_a_gradient(seen):
    found = seen["norms"]
    for norm, right, size, _ in found:
        assert norm == pytest.approx(right, rel=2e-7)
        assert size <= 16 * foreach.LARGE
    assert [launches for *_, launches in found[:2]] == [0, 0]  # all of them on the fast route


def clipped() -> list[tuple[bool, int]]:
    """Whether products are made in fp32 and rounded once, and the kernels on one tensor each, by what is scaled."""
    found = []
    with on_the_accelerator():
        for dtype in (torch.float32, *HALF, torch.float64, torch.complex64):
            for shapes in ([(200, 50)] * 3, [(4, 4)] * 48, [(), (3,), (0,)]):
                model = nn.ParameterList(nn.Parameter(here(noise(*shape).to(dtype))) for shape in shapes)
                values = [noise(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
                for parameter, value in zip(model, values, strict=True):
                    parameter.grad = here(value)
                coef = here(torch.tensor(COEF, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
                with no_waits(), counted_launches() as launches:
                    scale_([parameter.grad for parameter in model], coef)
                wide = [v if dtype.itemsize > 2 else v.float() for v in values]
                right = [(w * raw(coef)).to(dtype) for w in wide]
                same = all(torch.equal(raw(p.grad), r) for p, r in zip(model, right, strict=True))
                found.append((same, len(launches)))
    return found


def test_gradients_are_multiplied_by_the_fp32_factor_and_rounded_once_in_few_launches(seen):
    assert all(same and launches <= 4 for same, launches in seen["clipped"])


def tiny_factors() -> list[float]:
    """What a coefficient below 6e-8 leaves of fp16 gradients, and the norms that bf16 ones have when clipped to 1."""
    found = []
    with on_the_accelerator():
        for dtype, scale in ((torch.float16, 6e4), *((torch.bfloat16, 10.0 ** (k / 7)) for k in range(12))):
            gradient = (noise(200, 50) / 5 * scale).to(dtype)
            for clip in ("clipper", "function"):
                model = model_of((200, 50))
                model.to(dtype)
                model[0].grad = here(gradient)
                if clip == "clipper":
                    distclip.Clipper(model, 1.0).clip_()
                else:
                    distclip.clip_grad_norm_(model.parameters(), 1.0)
                found.append(true_norm([raw(model[0].grad)]))
    return found


def test_clipped_norms_of_bf16_and_fp16_are_the_bound(seen):
    """They were up to 0.24 % off."""
    assert seen["tiny_factors"] == [pytest.approx(1.0, rel=2e-4)] * len(seen["tiny_factors"])


def launched() -> dict[str, int]:
    """Kernels on one number or one tensor each, of calls for 48 gradients like those before; none of them waits."""
    found: dict[str, int] = {}

    def count(name, call) -> None:
        with no_waits(), counted_launches() as launches:
            call()
        found[name] = len(launches)

    with on_the_accelerator():
        for name, policy in POLICIES.items():
            model = model_of(*[(4, 4)] * 48)
            optimizer, clipper = adamw(model), distclip.Clipper(model, policy)
            for step in range(4):  # in calls 1, 2 and 4 copies are compared
                fill(model, step)
                clipper.step(optimizer)
            fill(model, 5)
            count(f"clip_, {name}", clipper.clip_)
            fill(model, 6)
            count(f"step, {name}", lambda c=clipper, o=optimizer: c.step(o))
        model = model_of(*[(4, 4)] * 48)
        parameters = list(model.parameters())
        for group in (None, dist.group.WORLD if dist.is_initialized() else None):
            for step in range(3):
                fill(model, step)
                count("clip_grad_norm_", lambda g=group: distclip.clip_grad_norm_(parameters, 1.0, group=g))
                count("clip_grad_norm_, inf", lambda: distclip.clip_grad_norm_(parameters, inf))
                gradients = [parameter.grad for parameter in parameters]
                count("get_total_norm", lambda gs=gradients, g=group: distclip.get_total_norm(gs, group=g))
                norm = distclip.get_total_norm(gradients)
                count("clip_grads_with_norm_", lambda n=norm: distclip.clip_grads_with_norm_(parameters, 1.0, n))
                count("clip_grad_value_", lambda: distclip.clip_grad_value_(parameters, 0.1))
    return found


def launched_alone() -> dict[str, int]:
    with patch.object(ClippingGroup, "of", lambda group: ClippingGroup.alone()):
        return launched()


LAUNCHES = {"max_norm": 20, "autoclip": 36, "values": 20}


def too_many(found: dict[str, int], more: int = 0) -> dict[str, int]:
    """Calls that launch more than they may."""
    most = dict.fromkeys(found, 15 + more)
    most |= {f"{call}, {policy}": n + more for policy, n in LAUNCHES.items() for call in ("clip_", "step")}
    return {name: count for name, count in found.items() if count > most[name]}


def test_a_step_launches_few_kernels_beside_the_work_on_tensors(seen):
    """They were 43 to 88, and one a tensor for elementwise bounds."""
    assert too_many(seen["launched_alone"]) == {}


def test_words_of_ranks_cost_a_few_kernels_more():
    found = run_ranks(launched, 2, fresh=True)[0]
    assert too_many(found, more=5) == {}
    assert max(found["clip_, max_norm"], found["step, max_norm"]) <= 19


def whole_copies() -> int:
    """The largest tensor that verify() makes beside a parameter of 20 MB."""
    with on_the_accelerator():
        model = model_of((5000, 2000))
        model.bfloat16()
        for parameter in model:
            parameter.grad = here(noise(5000, 2000, dtype=torch.bfloat16))
        clipper = distclip.Clipper(model, 1.0)
        with largest_tensor() as size:
            clipper.verify()
    return size[0]


def test_verify_makes_no_copy_as_large_as_a_parameter_in_int64():
    assert run_ranks(whole_copies, 2, fresh=True)[0] <= 8 * foreach.LARGE


def summed() -> list[tuple[list[float], list[int]]]:
    found = []
    with on_the_accelerator():
        trainer = SimpleNamespace(place=SimpleNamespace(device=torch.device(DEVICE)))
        for numbers in ([here(torch.tensor(1.5)), here(torch.tensor(2.0, dtype=torch.float64)), 1.0, 0.0], [0.0, 3.0]):
            with counted_waits() as waits:
                sums = Trainer.summed(trainer, numbers)
            found.append((sums, waits))
    return found


def test_the_trainer_waits_once_for_the_numbers_of_a_step():
    assert run_ranks(summed, 2, fresh=True) == [[([3.0, 4.0, 2.0, 0.0], [1]), ([0.0, 6.0], [1])]] * 2


def zero_steps() -> list[str]:
    """Where the count of steps is that ZeRO's optimizer starts with, once it has stepped: fused and not."""
    use_accelerator()
    found = []
    for fused in (True, False):
        flat = nn.Parameter(here(torch.ones(4)))
        optimizer = torch.optim.AdamW([flat], fused=fused)
        engine = SimpleNamespace(
            optimizer=SimpleNamespace(optimizer=optimizer, fp32_partitioned_groups_flat=[flat]),
            zero_optimization_stage=lambda: 3,
        )
        Zero(engine=engine, clipper=None, kept=("exp_avg", "exp_avg_sq"), counts=True).fill()
        flat.grad = here(torch.ones(4))
        optimizer.step()
        found += [state["step"].device.type for state in optimizer.state.values()]
    return found


def test_zero_counts_its_steps_where_the_optimizer_reads_them(seen):
    assert seen["zero_steps"] == [DEVICE, "cpu"]


ALONE = (
    *(products, routes, waiting, events, unscaled, converted),
    *(late_flags, norms, clipped, tiny_factors, zero_steps, launched_alone),
)


def everything() -> dict[str, Any]:
    return {function.__name__: function() for function in ALONE}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What each function above found, in one process that knows the device ever after."""
    return run_ranks(everything, 1, fresh=True)[0]
