"""A call does the same wherever it is made: under another default device, autocast, inference mode, torch.compile."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import inf
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.kernels import native
from distclip.ranks.group import ClippingGroup
from support.oracle import true_norm
from support.ranks import run_ranks, same_bits

SURROUNDINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(dtype)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return net


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def by_function(net: nn.Module, p: float) -> torch.Tensor:
    return distclip.clip_grad_norm_(net.parameters(), 0.5, p)


def by_parts(net: nn.Module, p: float) -> torch.Tensor:
    norm = distclip.get_total_norm(gradients(net), p)
    distclip.clip_grads_with_norm_(net.parameters(), 0.5, norm)
    return norm


def by_clipper(net: nn.Module, p: float) -> torch.Tensor:
    clipper = distclip.Clipper(net, 0.5, norm_type=p)
    clipper.verify()
    return clipper.clip_().norm


ROADS = [by_function, by_parts, by_clipper]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch's"])
@pytest.mark.parametrize("p", [2.0, 3.0, inf])
@pytest.mark.parametrize("use", ROADS)
@pytest.mark.parametrize("where", SURROUNDINGS)
def test_the_surroundings_of_a_call_change_nothing(where, use, p, compiled):
    if compiled and native.kernel is None:
        compiled = False  # what there is, is tried all the same
    kernel = native.kernel if compiled else None
    with patch.object(native, "kernel", kernel):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            net, same = model(dtype), model(dtype)
            expected = use(same, p)
            with SURROUNDINGS[where]():
                norm = use(net, p)
            assert norm.item() == pytest.approx(true_norm(gradients(model(dtype)), p), rel=2e-7)
            assert same_bits([norm, expected])
            assert norm.device.type == "cpu"
            assert all(map(torch.equal, gradients(net), gradients(same)))


@pytest.mark.parametrize("where", SURROUNDINGS)
def test_values_are_clamped_wherever_it_is_asked(where):
    net = model()
    with SURROUNDINGS[where]():
        distclip.clip_grad_value_(net.parameters(), 0.5)
    assert all(gradient.abs().max() <= 0.5 for gradient in gradients(net))


@pytest.mark.parametrize("use", ROADS, ids=lambda use: use.__name__)
@pytest.mark.parametrize("made", [0, 1, 2, 3])
def test_gradients_made_in_inference_mode_are_scaled(use, made):
    net, same = model(), model()
    use(same, 2.0)
    with torch.inference_mode():
        for parameter in list(net.parameters())[made:]:
            parameter.grad = parameter.grad.clone()
        use(net, 2.0)
    assert gradients(net)[-1].is_inference()
    assert all(map(torch.equal, gradients(net), gradients(same)))


def test_values_of_gradients_made_in_inference_mode_are_clamped():
    for policy in (None, distclip.ValueClip(0.5)):
        with torch.inference_mode():
            net = model()
            assert gradients(net)[0].is_inference()
            if policy is None:
                distclip.clip_grad_value_(net.parameters(), 0.5)
            else:
                distclip.Clipper(net, policy).clip_()
        assert max(gradient.abs().max().item() for gradient in gradients(net)) == 0.5


def test_what_is_kept_of_a_step_in_inference_mode_is_ordinary():
    net = model()
    clipper = distclip.Clipper(net, distclip.AutoClip(percentile=50, window=4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for scale in (1.0, 1.0, 9.0):
        with torch.inference_mode():
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, scale)
            clipper.step(optimizer)
    assert not any(value.is_inference() for value in clipper.state_dict()["policy"].values())
    for parameter in net.parameters():
        parameter.grad = torch.full(parameter.shape, 9.0)
    want = true_norm(gradients(net)) / 9
    assert clipper.step(optimizer).max_norm.item() == pytest.approx(5 * want, rel=1e-6)  # between 1, 1, 9 and 9
    assert int(clipper.state_dict()["policy"]["count"]) == 4


@pytest.mark.parametrize("where", SURROUNDINGS)
def test_a_clipper_made_in_surroundings_steps_outside_of_them(where):
    net, policy = model(), distclip.AutoClip(percentile=50, max_norm=0.5)
    with SURROUNDINGS[where]():
        clipper = distclip.Clipper(net, policy)
        state = clipper.state_dict()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper.step(optimizer)
    with SURROUNDINGS[where]():
        clipper.load_state_dict(state)
    report = clipper.step(optimizer)
    assert report.max_norm.item() == pytest.approx(0.5, rel=1e-6)


def test_a_default_device_that_was_set_is_not_ours():
    net = model()
    torch.set_default_device("meta")
    try:
        norm = distclip.clip_grad_norm_(net.parameters(), 0.5)
        report = distclip.Clipper(net, 1.0).measure()
    finally:
        torch.set_default_device(None)
    assert norm.item() == pytest.approx(true_norm(gradients(model())), rel=2e-7)
    assert report.norm.item() == pytest.approx(0.5, rel=1e-5)


def test_the_optimizer_steps_in_the_surroundings_of_the_call():
    seen = []

    class Asking(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.empty(()).device.type)
            return super().step(closure)

    net = model()
    optimizer = Asking(net.parameters(), lr=0.1)
    with torch.device("meta"):
        distclip.Clipper(net, 1.0).step(optimizer)
    assert seen == ["meta"]


def surrounded_on_every_rank(where: str) -> tuple[torch.Tensor, float]:
    net = model()
    with SURROUNDINGS[where]():
        clipper = distclip.Clipper(net, 0.5)
        norm = clipper.step(torch.optim.AdamW(net.parameters(), fused=True)).norm
    return norm, true_norm(gradients(model()))


@pytest.mark.parametrize("where", SURROUNDINGS)
def test_ranks_in_surroundings_agree(where):
    results = run_ranks(surrounded_on_every_rank, 2, where)
    assert same_bits([norm for norm, _ in results])
    assert all(norm.item() == pytest.approx(oracle, rel=2e-7) for norm, oracle in results)


# ---- torch.compile -----------------------------------------------------------------------------------------


def graphs_and_breaks(step: Callable[[], object]) -> tuple[int, int, int]:
    """Graphs that were compiled, breaks between them, and frames that were tried, of two calls of ``step``."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(step, backend=backend)
    compiled()
    compiled()
    return len(graphs), sum(counters["graph_break"].values()), counters["frames"]["total"]


@pytest.mark.parametrize("road", ["function", "clipper", "attached"])
def test_a_compiled_function_breaks_once_at_a_call_and_nothing_of_ours_is_traced(road):
    net, x = model(), torch.ones(3)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    clipper = None if road == "function" else distclip.Clipper(net, 0.5)
    if road == "attached":
        distclip.attach(optimizer, net, 0.5)

    def step():
        y = x * 2
        if road == "function":
            distclip.clip_grad_norm_(parameters, 0.5)
        elif road == "clipper":
            clipper.step(optimizer)
        else:
            optimizer.step()
        return y + 1

    assert graphs_and_breaks(step) == (2, 1, 2)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"):
        torch.compile(step, backend="eager", fullgraph=True)()


def test_importing_distclip_does_not_import_dynamo():
    program = "import distclip, sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- what has no values, or lies elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("use", ROADS)
def test_gradients_on_the_meta_device_are_refused_by_name(use):
    net = model()
    distclip.clip_grad_norm_(net.parameters(), 1.0)  # where they lie is known from here on
    for parameter in net.parameters():
        parameter.grad = None
    net[1].to("meta")
    net[1].weight.grad = torch.empty_like(net[1].weight)
    with pytest.raises(distclip.LayoutError, match=r"gradient of .* is on the meta device"):
        use(net, 2.0)


def meta_gradient_on_one_rank() -> str:
    net = model()
    net[1].to("meta")
    net[1].weight.grad = net[1].bias.grad = None
    clipper = distclip.Clipper(net, 1.0)
    clipper.measure()
    if dist.get_rank() == 1:
        net[1].weight.grad = torch.empty_like(net[1].weight)
    try:
        clipper.clip_()
    except (distclip.LayoutError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_a_meta_gradient_on_one_rank_is_an_error_on_all():
    here, there = run_ranks(meta_gradient_on_one_rank, 2)
    assert "rank 1" in here
    assert "stopped" in here
    assert "meta device" in there


def free(gradient: torch.Tensor) -> None:
    gradient.untyped_storage().resize_(0)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch's"])
@pytest.mark.parametrize("p", [2.0, 3.0, inf])
@pytest.mark.parametrize("use", [*ROADS, lambda net, p: distclip.clip_grad_value_(net.parameters(), 0.5)])
def test_gradients_whose_memory_was_freed_are_an_error_and_not_the_end_of_the_process(use, p, compiled):
    net = model()
    free(net[0].weight.grad)
    with (
        nullcontext() if compiled else patch.object(native, "kernel", None),
        pytest.raises(RuntimeError, match=r"has no memory: its storage was freed"),
    ):
        use(net, p)


def test_freed_memory_changes_no_other_gradient():
    net = model()
    free(net[1].weight.grad)
    before = net[0].weight.grad.clone()
    for clip in (
        lambda: distclip.clip_grad_value_(net.parameters(), 0.1),
        lambda: distclip.clip_grads_with_norm_(net.parameters(), 0.1, torch.tensor(5.0)),
    ):
        with pytest.raises(RuntimeError, match="freed"):
            clip()
    assert torch.equal(net[0].weight.grad, before)


def gradient_on_another_mesh(axes: int, road: str, eager: bool) -> str:
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    row = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    mesh, other, placements = (square, flat, [Shard(0), Replicate()]) if axes == 2 else (flat, square, [Shard(0)])
    if axes == 1 and eager:
        other = row  # as many axes, other ranks
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 3), mesh, placements))
    right = distribute_tensor(torch.ones(8, 3), mesh, placements)
    wrong = distribute_tensor(torch.ones(8, 3), other, [Shard(0)] * other.ndim)
    clipper = distclip.Clipper(nn.ParameterList([weight]), 1.0)
    if eager:  # a pending sum lets every call from the next one on realign before the all-reduce
        weight.grad = DTensor.from_local(torch.ones(8, 3), mesh, [Partial()] * mesh.ndim, run_check=False)
        clipper.clip_()
    weight.grad = wrong if dist.get_rank() == 3 or road == "function" else right
    try:
        if road == "function":
            distclip.clip_grad_norm_([weight], 1.0)
        else:
            clipper.clip_()
    except (distclip.LayoutError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("road", ["function", "clipper"])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_gradient_on_a_mesh_with_another_number_of_axes_is_an_error_on_all_ranks(axes, road, eager):
    results = run_ranks(gradient_on_another_mesh, 4, axes, road, eager)
    assert all(result.startswith("LayoutError") for result in results), results
    assert "mesh" in results[3].lower()


def not_a_member() -> list[str]:
    group = dist.new_group([0, 1])
    said = []
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    for use in (
        lambda: distclip.Clipper(nn.ParameterList([weight]), 1.0, split_over=[group]),
        lambda: distclip.clip_grad_norm_([weight], 1.0, group=group),
    ):
        try:
            use()
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


def test_split_over_a_group_that_a_rank_is_no_member_of_names_the_rank():
    first, _, third, _ = run_ranks(not_a_member, 4)
    assert "a group that rank 2 is not in" in third[0]
    assert "layout=" in third[0]
    assert "could not make its Clipper" in first[0]
    assert "rank 2" in first[0]
    assert "rank 2 is not in the clipping group" in third[1]
    assert first[1] == "no error"


def test_a_backend_whose_name_has_colons_says_where_words_are_reduced():
    config = "cpu:torchft-gloo:replica:0,cuda:torchft-gloo:replica:0"
    with (
        patch.object(ClippingGroup, "process_group", object()),
        patch.object(dist, "get_backend_config", lambda group: config),
    ):
        assert ClippingGroup(None, (0,), 0).device_for([torch.ones(1)]) == torch.device("cpu")


def test_verify_while_another_thread_makes_clippers():
    made: list[distclip.Clipper] = []

    class Busy(frozenset):
        def isdisjoint(self, others):  # asked by verify(), in whose midst another thread then makes one
            made.append(distclip.Clipper(model(), 1.0))
            return super().isdisjoint(others)

    net = model()
    clipper, busy = distclip.Clipper(net, 1.0), distclip.Clipper(model(), 1.0)
    clipper.engine.owner.clipped = Busy(clipper.engine.owner.clipped)
    clipper.verify()
    assert made
    assert busy.report is None
