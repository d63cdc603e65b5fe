"""What users really do to gradients between the backward and the step: the norm stays true, or there is an error."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from math import inf

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import distclip
from distclip.kernels import local_norms
from distclip.kernels.sums import CHUNK, ROW, SMALL, TAILS, WINDOW
from support.oracle import true_norm
from support.ranks import run_ranks, same_bits

SCALE = 1024.0


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moduli(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the oracle takes: complex numbers by their absolute value."""
    return [t.detach().to(torch.complex128).abs() if t.is_complex() else t for t in tensors]


# ---- gradients that change between the backward and the call -----------------------------------------------


class Net(nn.Module):
    """Layers of uneven sizes on ranks; the last is used only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.spare = nn.Linear(7, 7)

    def forward(self, x, spare=False):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.spare(x) if spare else x


def ddp() -> nn.Module:
    return DistributedDataParallel(
        Net(), gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=0.0005
    )


def fsdp2() -> nn.Module:
    net = Net()
    for layer in [*net.layers, net.spare]:
        fully_shard(layer)
    return fully_shard(net)


def backward(model: nn.Module, seed: int, spare: bool = False) -> None:
    (30 * model(numbers(4, 7, seed=10 * seed + dist.get_rank()), spare=spare).square().mean()).backward()


def whole(model: nn.Module) -> list[Tensor]:
    """The true gradients: averaged by DDP, gathered from FSDP2."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def in_place(gradient: Tensor) -> None:
    gradient.mul_(3.0)


def through_data(gradient: Tensor) -> None:
    gradient.data.mul_(3.0)


def by_foreach(gradient: Tensor) -> None:
    torch._foreach_mul_([gradient], 3.0)


def by_a_collective(gradient: Tensor) -> None:
    dist.all_reduce(gradient.to_local() if isinstance(gradient, DTensor) else gradient)


def through_numpy(gradient: Tensor) -> None:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local.detach().numpy()[...] *= 3.0


def one_element(gradient: Tensor) -> None:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local.data.view(-1)[-1:] = 100.0


def copied_over(gradient: Tensor) -> None:
    gradient.copy_(gradient * 3.0)


CHANGES = [in_place, through_data, by_foreach, by_a_collective, through_numpy, one_element, copied_over]


def changed_after_the_backward(make: Callable[[], nn.Module]) -> list[tuple[str, float, float]]:
    torch.manual_seed(0)
    model = make()
    clipper = distclip.Clipper(model, 1.0)
    seen = []
    for change in CHANGES:
        for parameter in model.parameters():
            parameter.grad = None
        backward(model, 0, spare=True)
        for rank_alike in (p.grad for p in model.parameters()):  # uneven shards: every rank changes each of its own
            change(rank_alike)
        seen.append((change.__name__, clipper.measure().norm.item(), true_norm(whole(model))))
    return seen


def even() -> nn.Module:
    """All shards have a size, so that every rank makes the same collectives."""
    net = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    for layer in net:
        fully_shard(layer)
    return fully_shard(Chain(net))


class Chain(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.layers = layers

    def forward(self, x, spare=False):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize("make", [ddp, even])
def test_every_way_to_change_a_gradient_is_seen(make):
    """A DTensor's local tensor keeps its version under ``mul_``, and so does any under a collective or by ``.data``."""
    for name, norm, oracle in run_ranks(changed_after_the_backward, 2, make)[0]:
        assert norm == pytest.approx(oracle, rel=2e-7), name


def between_calls(make: Callable[[], nn.Module]) -> list[tuple[str, Tensor, float]]:
    """Each: what was done, the norm we report, and the oracle."""
    torch.manual_seed(0)
    model = make()
    clipper, seen = distclip.Clipper(model, 1.0), []

    def check(name: str) -> None:
        seen.append((name, clipper.measure().norm, true_norm(whole(model))))

    backward(model, 0)
    check("first")
    backward(model, 1)
    check("accumulated")
    model.zero_grad()
    backward(model, 2, spare=True)
    check("a layer that was not used before")
    model.zero_grad()
    backward(model, 3)
    check("a layer that is not used any more")
    parameter = list(model.parameters())[1]
    parameter.grad = parameter.grad * 50.0
    check("replaced")
    clipper.clip_()
    check("clipped")
    backward(model, 4)
    check("accumulated on what was clipped")
    list(model.parameters())[2].grad = None
    check("one taken away")
    if make is ddp:
        model.zero_grad()
        with model.no_sync():
            backward(model, 5)
        backward(model, 6)
        check("no_sync, then a backward that reduces")
    return seen


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", [ddp, fsdp2])
def test_gradients_that_come_go_and_accumulate_are_seen(make, size):
    results = run_ranks(between_calls, size, make)
    for name, norm, oracle in results[0]:
        assert norm.item() == pytest.approx(oracle, rel=2e-7), name
    assert same_bits([[norm for _, norm, _ in r] for r in results])


def scaled_loss(make: Callable[[], nn.Module], unscaled_by_user: bool) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model, scaler = make(), GradScaler("cpu", init_scale=SCALE)
    clipper, optimizer = distclip.Clipper(model, 1.0), AdamW(model.parameters(), lr=1e-3)
    seen = []
    for step in range(3):
        rows = numbers(4, 7, seed=step)
        scaler.scale(30 * model(rows, spare=True).square().mean()).backward()
        oracle = true_norm(whole(model)) / SCALE
        if unscaled_by_user:
            scaler.unscale_(optimizer)
        seen.append((clipper.step(optimizer, scaler=scaler).norm.item(), oracle))
        scaler.update()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("unscaled_by_user", [False, True])
@pytest.mark.parametrize("make", [ddp, fsdp2])
def test_a_scaled_loss_is_measured_unscaled(make, unscaled_by_user):
    for norm, oracle in run_ranks(scaled_loss, 2, make, unscaled_by_user)[0]:
        assert norm == pytest.approx(oracle, rel=1e-6)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 7, sparse=True)
        self.layer = nn.Linear(7, 7)

    def forward(self, x):
        return self.layer(self.words(x))


def sparse_buckets() -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Words(), gradient_as_bucket_view=True)
    clipper, seen = distclip.Clipper(model, 1.0), []
    for step in range(3):
        model.zero_grad()
        (30 * model(torch.tensor([step, 2, 2, dist.get_rank()])).square().mean()).backward()
        dense = [p.grad.to_dense() for p in model.parameters()]
        seen.append((clipper.measure().norm.item(), true_norm(dense)))
    return seen


def test_sparse_gradients_in_buckets():
    for norm, oracle in run_ranks(sparse_buckets, 2)[0]:
        assert norm == pytest.approx(oracle, rel=2e-7)


def modules_in_one_group(part: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7))
    fully_shard([model[0], model[2]])
    fully_shard(model)
    clipped = model[0] if part else model
    clipper = distclip.Clipper(clipped, 1.0)
    (30 * model(numbers(4, 7)).square().mean()).backward()
    return clipper.measure().norm.item(), true_norm(whole(clipped))


@pytest.mark.parametrize("part", [False, True])
def test_several_modules_in_one_fully_shard(part):
    for norm, oracle in run_ranks(modules_in_one_group, 2, part):
        assert norm == pytest.approx(oracle, rel=2e-7)


def hybrid_steps() -> list[tuple[str, Tensor, float]]:
    torch.manual_seed(0)
    model, mesh = Net(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in [*model.layers, model.spare]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    clipper, seen = distclip.Clipper(model, 1.0), []

    def check(name: str, *seeds: int) -> None:
        for seed in seeds:
            backward(model, seed, spare=True)
        seen.append((name, clipper.measure().norm, true_norm(whole(model))))

    check("one", 0)
    check("accumulated", 1)
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    backward(model, 2, spare=True)
    model.set_requires_gradient_sync(True)
    check("accumulated before it was reduced", 3)
    model.zero_grad()
    model.set_requires_all_reduce(False)
    backward(model, 4, spare=True)
    model.set_requires_all_reduce(True)
    check("reduced in two steps", 5)
    model.layers[1].weight.requires_grad_(False)
    model.zero_grad()
    check("frozen", 6)
    model.layers[1].weight.requires_grad_(True)
    model.zero_grad()
    check("thawed", 7)
    check("thawed and accumulated", 8)
    return seen


def test_hybrid_shards_that_accumulate_are_reduced_in_parts_or_thaw():
    results = run_ranks(hybrid_steps, 4)
    for name, norm, oracle in results[0]:
        assert norm.item() == pytest.approx(oracle, rel=2e-7), name
    assert same_bits([[norm for _, norm, _ in r] for r in results])


def static_graph() -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=0.0005)
    clipper, seen = distclip.Clipper(model, 1.0), []
    for step in range(5):
        backward(model, step)
        seen.append((clipper.measure().norm.item(), true_norm(whole(model))))
        if step != 1:  # the next is added to it
            model.zero_grad(set_to_none=step == 0)
    return seen


def test_a_static_graph_that_accumulates():
    for norm, oracle in run_ranks(static_graph, 2)[0]:
        assert norm == pytest.approx(oracle, rel=2e-7)


# ---- gradients that are not what a backward makes ----------------------------------------------------------


class Complex(nn.Module):
    """Its weight gets a lazy conjugate for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(numbers(7, dtype=torch.complex64))
        self.scale = Parameter(numbers(7, seed=1))

    def forward(self, x):
        return (x * self.weight.conj()).real * self.scale


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
def test_a_lazy_conjugate_is_clipped(p):
    for use in ("function", "clip_", "step"):
        model = Complex()
        for _ in range(3):
            model.zero_grad()
            model(numbers(4, 7)).square().sum().backward()
            assert model.weight.grad.is_conj(), "torch makes them no more"
            expected = [g.resolve_conj().clone() for g in (model.weight.grad, model.scale.grad)]
            oracle = true_norm(moduli(expected), p)
            if use == "function":
                norm = distclip.clip_grad_norm_(model, 0.5, p)
            elif use == "clip_":
                norm = distclip.Clipper(model, 0.5, norm_type=p).clip_().norm
            else:
                norm = distclip.Clipper(model, 0.5, norm_type=p).step(SGD(model.parameters(), lr=0.0)).norm
            assert norm.item() == pytest.approx(oracle, rel=2e-7)
            for got, whole_one in zip((model.weight.grad, model.scale.grad), expected, strict=True):
                torch.testing.assert_close(got.resolve_conj(), whole_one * (0.5 / oracle))


def test_a_gradient_that_becomes_a_lazy_conjugate_is_noticed():
    parameters = [Parameter(numbers(8, dtype=torch.complex64)) for _ in range(2)]
    clipper = distclip.Clipper(nn.ParameterList(parameters), distclip.ValueClip((-0.1, 0.7)))
    for step in range(6):
        block = numbers(16, seed=step, dtype=torch.complex64)
        halves = [block[:8], block[8:]]
        if step in (2, 5):
            halves = [halves[0].conj(), halves[1]]
        expected = []
        for parameter, half in zip(parameters, halves, strict=True):
            parameter.grad = half
            parts = torch.view_as_real(half.resolve_conj().clone())
            expected.append(torch.view_as_complex(parts.clamp(-0.1, 0.7)))
        assert clipper.measure().norm.item() == pytest.approx(true_norm(moduli(halves)), rel=2e-7)
        clipper.clip_()
        assert all(torch.equal(p.grad.resolve_conj(), e) for p, e in zip(parameters, expected, strict=True))


def test_an_expanded_gradient_is_clipped():
    """``torch.autograd.grad(w.sum(), w)`` returns one; torch raises, with the gradients before it already scaled."""
    weights = [Parameter(numbers(300)), Parameter(numbers(6, 50))]
    loss = weights[0].square().sum() + weights[1].sum()
    clipper = distclip.Clipper(nn.ParameterList(weights), 0.5)
    for use in (clipper.clip_, lambda: distclip.clip_grad_norm_(weights, 0.5)):
        for _ in range(2):
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
                weight.grad = gradient
            assert weights[1].grad.stride() == (0, 0)
            use()
            assert true_norm([w.grad for w in weights]) == pytest.approx(0.5, rel=1e-5)


def complex_on_ranks() -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Complex(), gradient_as_bucket_view=True)
    clipper, seen = distclip.Clipper(model, 1.0), []
    for step in range(3):
        model(numbers(4, 7, seed=step)).square().sum().backward()
        seen.append((clipper.measure().norm.item(), true_norm(moduli(whole(model)))))
    return seen


def test_complex_parameters_on_ranks():
    for norm, oracle in run_ranks(complex_on_ranks, 2)[0]:
        assert norm == pytest.approx(oracle, rel=2e-7)


def in_one_block(*sizes: int) -> list[Parameter]:
    block, parameters, start = numbers(sum(sizes)), [], 0
    for size in sizes:
        parameters.append(Parameter(torch.zeros(size)))
        parameters[-1].grad = block[start : start + size]
        start += size
    return parameters


def resized(parameter: Parameter, gradient: Tensor) -> None:
    """In place, as pruning does it: the gradient stays the same object."""
    parameter.data = torch.zeros_like(gradient)
    parameter.grad.data = gradient


@pytest.mark.parametrize("sizes", [(100, 100, 100), (100,), (100, 0, 100)])
def test_a_gradient_that_changes_its_size_in_place_is_noticed(sizes):
    parameters = in_one_block(*sizes)
    clipper = distclip.Clipper(nn.ParameterList(parameters), 1e9)
    k = len(sizes) // 2
    for gradient in (None, None, parameters[k].grad[: sizes[k] // 2], torch.ones(70), torch.ones(0), torch.ones(9, 3)):
        if gradient is not None:
            resized(parameters[k], gradient)
        oracle = true_norm([p.grad for p in parameters])
        for _ in range(2):
            assert clipper.measure().norm.item() == pytest.approx(oracle, rel=2e-7)
            assert distclip.clip_grad_norm_(parameters, 1e9).item() == pytest.approx(oracle, rel=2e-7)


def plain_beside_fsdp2() -> list[tuple[str, float, float]]:
    """The plain gradients of a model in which FSDP2 manages the rest become smaller, another dtype, sparse."""
    torch.manual_seed(0)
    model = nn.Module()
    model.sharded = fully_shard(nn.Linear(8, 8))
    model.plain = nn.ParameterList(Parameter(torch.zeros(40, 2)) for _ in range(3))
    clipper, seen = distclip.Clipper(model, 1e9), []
    block = numbers(4 * 80)

    def sparse(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor([[0, 3, 3]], values[:3], values.shape, check_invariants=True)

    def of_bf16(values: Tensor) -> Tensor:
        return values.view(torch.bfloat16).copy_(torch.cat([values, values + 1], 1))

    def as_it_is(values: Tensor) -> Tensor:
        return values

    ways = {"first": as_it_is, "second": as_it_is, "smaller": lambda v: v[:20], "again": as_it_is, "bf16": of_bf16}
    ways |= {"fp32": as_it_is, "merged": as_it_is, "sparse": sparse, "dense": as_it_is}
    for name, way in ways.items():
        model.sharded(numbers(4, 8)).square().mean().backward()
        block.copy_(numbers(4 * 80, seed=1))
        gradients = [way(part.view(40, 2)) for part in block[:240].split(80)]
        for parameter, gradient in zip(model.plain, gradients, strict=True):
            parameter.data = torch.zeros(gradient.shape, dtype=gradient.dtype)
            parameter.grad = gradient
        whole_ones = [p.grad.full_tensor() for p in model.sharded.parameters()]
        oracle = true_norm([*whole_ones, *(g.to_dense() for g in gradients)])
        seen.append((name, clipper.measure().norm.item(), oracle))
        model.sharded.zero_grad()
    return seen


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 warns although they were asked for
def test_plain_gradients_beside_fsdp2_are_looked_at():
    for name, norm, oracle in run_ranks(plain_beside_fsdp2, 2)[0]:
        assert norm == pytest.approx(oracle, rel=2e-7), name


def fsdp1(original: bool) -> FullyShardedDataParallel:
    torch.manual_seed(0)
    wrap = partial(FullyShardedDataParallel, use_orig_params=original, device_id=torch.device("cpu"))
    return wrap(nn.Sequential(wrap(nn.Linear(7, 7)), nn.Tanh(), nn.Linear(7, 7)))


def fsdp1_steps(original: bool) -> list[tuple[float, float]]:
    """Accumulated, with and without no_sync, zeroed in place: what is reduced is right, what is not is refused."""
    model = fsdp1(original)
    clipper, seen = distclip.Clipper(model, 0.5), []
    for step in range(6):
        if step in (2, 3):
            with model.no_sync() if step == 3 else nullcontext():
                backward_of(model, 10 + step)
        backward_of(model, step)
        squares = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum()
        dist.all_reduce(squares)
        seen += [
            (n.item(), squares.item() ** 0.5) for n in (clipper.measure().norm, distclip.clip_grad_norm_(model, inf))
        ]
        clipper.clip_()
        model.zero_grad(set_to_none=step % 2 == 0)
    return seen


def backward_of(model: nn.Module, seed: int) -> None:
    (30 * model(numbers(4, 7, seed=10 * seed + dist.get_rank())).square().mean()).backward()


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_in_every_way_to_accumulate(original):
    for norm, oracle in run_ranks(fsdp1_steps, 2, original)[0]:
        assert norm == pytest.approx(oracle, rel=2e-7)


def fsdp1_not_reduced(original: bool, before: bool) -> list[str]:
    model, said = fsdp1(original), []
    clipper = distclip.Clipper(model, 0.5)
    if before:
        backward_of(model, 0)
        clipper.clip_()
        model.zero_grad()
    for use in (clipper.measure, clipper.clip_, lambda: distclip.clip_grad_norm_(model, 0.5)):
        with model.no_sync():
            backward_of(model, 1)
        try:
            use()
        except distclip.LayoutError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_gradients_that_are_not_reduced_are_refused(original, before):
    for said in run_ranks(fsdp1_not_reduced, 2, original, before):
        assert [("not reduced yet" in text or "do not agree" in text) for text in said] == [True] * 3


# ---- folding -----------------------------------------------------------------------------------------------

FUSED: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(Adam, lr=0.1, maximize=True),
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.1, amsgrad=True),
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True),
    "adagrad": partial(Adagrad, lr=0.1, maximize=True),
}
LIES: dict[str, Callable[[int], Tensor]] = {
    "plain": lambda seed: numbers(6, 8, seed=seed),
    "transposed": lambda seed: numbers(8, 6, seed=seed).t(),
    "a part": lambda seed: numbers(12, 20, seed=seed)[::2, 3:11],
    "expanded": lambda seed: numbers(6, 1, seed=seed).expand(6, 8),
    "a parameter": lambda seed: Parameter(numbers(6, 8, seed=seed)),
    "of a graph": lambda seed: numbers(6, 8, seed=seed).requires_grad_() * 2,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("lies", LIES)
def test_a_step_is_clip_then_step_however_the_gradient_lies(lies, name, fused):
    """torch's fused kernels on the CPU take strides for granted: they read, and with a factor write, other elements."""
    mine, theirs = ([Parameter(numbers(6, 8, seed=k)) for k in range(2)] for _ in range(2))
    optimizer, reference = FUSED[name](mine, fused=fused), FUSED[name](theirs)
    if fused and not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip(f"the fused {name} of torch {torch.__version__} cannot fold, and takes strides for granted")
    clipper = distclip.Clipper(nn.ParameterList(mine), 1.0)
    for step in range(3):
        for k in range(2):
            mine[k].grad = LIES[lies](10 * step + k)
            theirs[k].grad = mine[k].grad.detach().clone(memory_format=torch.contiguous_format)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        clipper.step(optimizer)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_fold_changes_nothing_beside_a_gradient():
    weight = Parameter(numbers(6, 8))
    block = numbers(12, 20)
    outside = torch.ones(12, 20, dtype=torch.bool)
    outside[::2, 3:11] = False
    kept = block.clone()
    weight.grad = block[::2, 3:11]
    assert distclip.Clipper(nn.ParameterList([weight]), 0.1).step(SGD([weight], lr=1.0, fused=True)).coef < 1
    assert torch.equal(block[outside], kept[outside])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_fused_optimizer_without_parameters_steps(scaled):
    """Of a rank whose stage has none of a kind."""
    model = nn.Linear(3, 3)
    optimizers = [SGD(model.parameters(), lr=0.1), AdamW([{"params": []}], fused=True)]
    scaler = GradScaler("cpu", init_scale=SCALE) if scaled else None
    loss = model(numbers(2, 3)).square().sum()
    (loss if scaler is None else scaler.scale(loss)).backward()
    before = model.weight.detach().clone()
    distclip.Clipper(model, 0.1).step(*optimizers, scaler=scaler)
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_without_gradients_steps_beside_a_scaler(fused):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizers = [Adam(layer.parameters(), fused=fused) for layer in model]
    scaler, clipper = GradScaler("cpu", init_scale=SCALE), distclip.Clipper(model, 0.1)
    for bad in (False, True):
        scaler.scale(model[0](numbers(2, 3)).square().sum()).backward()
        if bad:
            model[0].weight.grad[0, 0] = inf
        before = [p.detach().clone() for p in model.parameters()]
        assert clipper.step(*optimizers, scaler=scaler).skip.item() is bad
        scaler.update()
        assert scaler.get_scale() == (SCALE / 2 if bad else SCALE)
        same = [torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
        assert same == [bad, bad, True, True]
        model.zero_grad()


def test_what_a_scaler_would_unscale_twice_is_refused():
    weights = nn.ParameterList([Parameter(torch.ones(4)), Parameter(torch.ones(4))])
    scaler, clipper = GradScaler("cpu", init_scale=SCALE), distclip.Clipper(weights, 1.0)
    scaler.scale(weights[0].sum() + weights[1].sum()).backward()
    with pytest.raises(ValueError, match="unscale a gradient twice"):
        clipper.step(SGD(weights, lr=0.1), SGD([weights[0]], lr=0.1), scaler=scaler)
    weights[1].grad = weights[0].grad
    with pytest.raises(ValueError, match="unscale a gradient twice"):
        clipper.step(SGD(weights, lr=0.1), scaler=scaler)
    assert weights[0].grad.tolist() == [SCALE] * 4


def test_a_factor_too_small_for_its_inverse_leaves_no_gradient_zero():
    model = nn.Linear(1000, 1000)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)
    before = model.weight.detach().clone()
    report = distclip.Clipper(model, 1.0).step(SGD(model.parameters(), lr=1.0, fused=True))
    assert 0 < report.coef < 1e-40
    assert (before != model.weight).all()


# ---- sums: tails, windows and chunks across tensors --------------------------------------------------------


def many(sizes: list[int], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [numbers(size, seed=k, dtype=torch.float64).to(dtypes[k % len(dtypes)]) for k, size in enumerate(sizes)]


MIXED = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, inf])
@pytest.mark.parametrize(
    "sizes",
    [
        [ROW - 1] * 5,
        [SMALL + 1] * 7,
        [SMALL + ROW + 1] * (TAILS // 100),
        [CHUNK + 1, SMALL + 1, 1, CHUNK - 1] * 3,
        [WINDOW * ROW // 2 + 3, WINDOW * ROW // 2 + 5, ROW],
        [WINDOW * ROW],
        [1, 3] * 700,
    ],
    ids=lambda sizes: f"{len(sizes)} from {sizes[0]}",
)
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.bfloat16, torch.float32], MIXED], ids=["fp32", "two", "all"]
)
def test_one_sum_of_many_tensors(sizes, dtypes, p):
    tensors = many(sizes, dtypes)
    parameters = [Parameter(torch.zeros_like(t)) for t in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor
    oracle = true_norm(moduli(tensors), p)
    assert distclip.clip_grad_norm_(parameters, inf, p).item() == pytest.approx(oracle, rel=3e-7)


def test_more_tails_than_are_kept_and_rows_out_of_range_across_tensors():
    tensors = [numbers(SMALL + 1 + k % ROW, seed=k) * 10.0 ** (k % 3 * 20 - 20) for k in range(40)]
    oracle = true_norm([torch.tensor(true_norm([t]), dtype=torch.float64) for t in tensors])
    parameters = [Parameter(torch.zeros_like(t)) for t in tensors]
    for order in (1, -1):
        for parameter, tensor in zip(parameters, tensors[::order], strict=True):
            parameter.data, parameter.grad = torch.zeros_like(tensor), tensor
        assert distclip.clip_grad_norm_(parameters, inf).item() == pytest.approx(oracle, rel=2e-7)
    assert local_norms(tensors, 2.0).tolist() == pytest.approx([true_norm([t]) for t in tensors], rel=2e-7)
