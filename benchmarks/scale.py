"""Plans of real models on thousands of ranks, made in one process: their time, memory and messages.

    python benchmarks/scale.py                                  # all models, 512 to 16384 ranks, 10 minutes
    python benchmarks/scale.py --worlds 512 16384 --models gpt2 llama3-8b --json figures.json
    python benchmarks/scale.py --proofs 24 696                  # verify() of ranks with so many experts, half a minute

Weights are on the meta device. torch's own ``fully_shard`` and ``distribute_tensor`` cut them, so pieces, placements
and meshes are those of a real run. torch's ``fake`` process groups know their ranks and return messages unchanged:
which collectives run, and their sizes, are real; nothing is communicated, and no time of one is measured. Figures are
those of rank 0, times are CPU time, which other programs hardly change. Private torch API, 2.13:
``torch.testing._internal.distributed.fake_pg``.
"""

import argparse
import gc
import json
import shlex
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip.bench.contests import Tenths
from distclip.bench.machine import cpu_model
from distclip.clipper import Clipper
from distclip.layouts.model import held_in
from distclip.plan.build import Plan
from distclip.plan.contribution import norms_on
from distclip.plan.measure import TAG_STEP
from distclip.plan.split import count_split
from distclip.plan.units import Parameter
from distclip.ranks.connections import pass_on
from distclip.ranks.group import ClippingGroup
from distclip.ranks.message import CODES

WORLDS = (512, 2048, 8192, 16384)
SHARDS, TENSOR, STAGES, EXPERT = 8, 8, 16, 64  # ranks along the HSDP shard, TP, PP and EP axes
REPEATS = 5

# ---- models: the parameters of each, as their configurations say -------------------------------------------


@dataclass(frozen=True, slots=True)
class Weight:
    """``tp``: the dimension that tensor parallelism cuts, None for one it leaves whole. ``experts``: one a row."""

    name: str
    shape: tuple[int, ...]
    tp: int | None = None
    experts: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """``first`` comes before the layers (in a pipeline: on their first stage), ``last`` after them."""

    name: str
    source: str
    first: Sequence[Weight]
    layers: Sequence[Sequence[Weight]]
    last: Sequence[Weight]

    def weights(self) -> Iterator[Weight]:
        yield from self.first
        for layer in self.layers:
            yield from layer
        yield from self.last


def gpt2() -> Model:
    d, layers, vocab, context = 768, 12, 50257, 1024
    norms = [Weight(f"{norm}.{part}", (d,)) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")]
    sizes = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}
    matrices = [Weight(f"{name}.weight", shape) for name, shape in sizes.items()]
    biases = [Weight(f"{name}.bias", shape[1:]) for name, shape in sizes.items()]
    return Model(
        name="gpt2",
        source="openai-community/gpt2 (124M): n_embd 768, n_layer 12, vocab 50257, n_positions 1024, tied head",
        first=[Weight("wte.weight", (vocab, d)), Weight("wpe.weight", (context, d))],
        layers=[norms + matrices + biases] * layers,
        last=[Weight("ln_f.weight", (d,)), Weight("ln_f.bias", (d,))],
    )


def llama3(name: str, source: str, d: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> Model:
    kv = d // heads * kv_heads
    layer = [
        Weight("attention_norm.weight", (d,)),
        Weight("attention.wq.weight", (d, d), tp=0),
        Weight("attention.wk.weight", (kv, d), tp=0),
        Weight("attention.wv.weight", (kv, d), tp=0),
        Weight("attention.wo.weight", (d, d), tp=1),
        Weight("ffn_norm.weight", (d,)),
        Weight("feed_forward.w1.weight", (ffn, d), tp=0),
        Weight("feed_forward.w2.weight", (d, ffn), tp=1),
        Weight("feed_forward.w3.weight", (ffn, d), tp=0),
    ]
    first = [Weight("tok_embeddings.weight", (vocab, d), tp=0)]
    last = [Weight("norm.weight", (d,)), Weight("output.weight", (vocab, d), tp=0)]
    return Model(name, source, first, [layer] * layers, last)


def llama3_8b() -> Model:
    source = "meta-llama/Meta-Llama-3-8B: hidden 4096, layers 32, heads 32, kv heads 8, ffn 14336, vocab 128256"
    return llama3("llama3-8b", source, d=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)


def llama3_70b() -> Model:
    source = "meta-llama/Meta-Llama-3-70B: hidden 8192, layers 80, heads 64, kv heads 8, ffn 28672, vocab 128256"
    return llama3("llama3-70b", source, d=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=128256)


def deepseek_v3() -> Model:
    d, dense, sparse, vocab, ffn = 7168, 3, 58, 129280, 18432
    common = _latent_attention(d, heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)
    experts, width = 256, 2048
    mixture = [
        Weight("mlp.gate.weight", (experts, d)),
        *_gated("mlp.shared_experts", d, width),
        *_gated("mlp.experts", d, width, experts),
    ]
    return Model(
        name="deepseek-v3",
        source="deepseek-ai/DeepSeek-V3: hidden 7168, layers 61 (3 dense), heads 128, q_lora 1536, kv_lora 512, "
        "qk_nope 128, qk_rope 64, v_head 128, ffn 18432, 256 experts of 2048 + 1 shared, vocab 129280",
        first=[Weight("embed_tokens.weight", (vocab, d))],
        layers=[common + _gated("mlp", d, ffn)] * dense + [common + mixture] * sparse,
        last=[Weight("norm.weight", (d,)), Weight("lm_head.weight", (vocab, d))],
    )


def _latent_attention(
    d: int, heads: int, *, q_rank: int, kv_rank: int, nope: int, rope: int, value: int
) -> list[Weight]:
    sizes = {
        "input_layernorm": (d,),
        "self_attn.q_a_proj": (q_rank, d),
        "self_attn.q_a_layernorm": (q_rank,),
        "self_attn.q_b_proj": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa": (kv_rank + rope, d),
        "self_attn.kv_a_layernorm": (kv_rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), kv_rank),
        "self_attn.o_proj": (d, heads * value),
        "post_attention_layernorm": (d,),
    }
    return [Weight(f"{name}.weight", shape) for name, shape in sizes.items()]


def _gated(path: str, d: int, width: int, experts: int = 0) -> list[Weight]:
    """The three matrices of a gated feed-forward, or of ``experts`` of them as one tensor each."""
    sizes = {"gate_proj": (width, d), "up_proj": (width, d), "down_proj": (d, width)}
    if not experts:
        return [Weight(f"{path}.{name}.weight", shape) for name, shape in sizes.items()]
    return [Weight(f"{path}.{name}", (experts, *shape), experts=True) for name, shape in sizes.items()]


# ---- layouts: how rank 0 holds them ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    """What rank 0 holds of a model, and what its user writes beside it: ``split_over`` or ``layout``."""

    module: nn.Module
    written: Mapping[str, Any] = field(default_factory=dict)


def fsdp(model: Model, world: int) -> Placed:
    """FSDP2 over all ranks."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    return Placed(_sharded(model, mesh))


def hsdp(model: Model, world: int) -> Placed:
    """FSDP2 over 8 ranks, replicated on the others."""
    mesh = init_device_mesh("cpu", (world // SHARDS, SHARDS), mesh_dim_names=("replicate", "shard"))
    return Placed(_sharded(model, mesh))


def fsdp_tp(model: Model, world: int) -> Placed:
    """FSDP2 over tensor parallel on 8 ranks; norm layers are outside the tensor-parallel plan."""
    mesh = init_device_mesh("cpu", (world // TENSOR, TENSOR), mesh_dim_names=("dp", "tp"))
    return Placed(_sharded(model, mesh["dp"], partial(_cut, mesh=mesh["tp"])))


def pp_fsdp_tp(model: Model, world: int) -> Placed:
    """The first of 16 pipeline stages, in FSDP2 over tensor parallel on 8 ranks."""
    mesh = init_device_mesh("cpu", (STAGES, world // STAGES // TENSOR, TENSOR), mesh_dim_names=("pp", "dp", "tp"))
    stage = Model(model.name, model.source, model.first, model.layers[: len(model.layers) // STAGES], [])
    return Placed(_sharded(stage, mesh["dp"], partial(_cut, mesh=mesh["tp"])), {"split_over": [mesh["pp"]]})


def ep_dtensor(model: Model, world: int) -> Placed:
    """FSDP2 over all ranks; the experts as DTensors on 64 ranks, in FSDP2 over the ranks that share them."""
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    mesh = init_device_mesh("cpu", (world // EXPERT, EXPERT), mesh_dim_names=("efsdp", "ep"))

    def place(weight: Weight) -> dict[str, Tensor]:
        whole = _empty(weight.shape)
        there = distribute_tensor(whole, mesh["ep"], [Shard(0)], src_data_rank=None) if weight.experts else whole
        return {weight.name: there}

    return Placed(_sharded(model, everyone, place, mesh["efsdp"]))


def ep_plain(model: Model, world: int) -> Placed:
    """FSDP2 over all ranks, but 4 of 256 experts of each layer are plain parameters of this rank; ``layout=``."""
    everyone = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    mesh = init_device_mesh("cpu", (world // EXPERT, EXPERT), mesh_dim_names=("efsdp", "ep"))
    copies = distclip.Layout.cut(over=[mesh["ep"]])

    def place(weight: Weight) -> dict[str, Tensor]:
        if not weight.experts:
            return {weight.name: _empty(weight.shape)}
        return {f"{weight.name}.{k}": _empty(weight.shape[1:]) for k in range(weight.shape[0] // EXPERT)}

    module = _sharded(model, everyone, place)
    return Placed(module, {"layout": lambda name, p: copies if ".experts." in name else None})


def _empty(shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, device="meta")


def _whole(weight: Weight) -> dict[str, Tensor]:
    return {weight.name: _empty(weight.shape)}


def _cut(weight: Weight, mesh: DeviceMesh) -> dict[str, Tensor]:
    whole = _empty(weight.shape)
    if weight.tp is None:
        return {weight.name: whole}
    return {weight.name: distribute_tensor(whole, mesh, [Shard(weight.tp)], src_data_rank=None)}


class Group(nn.Module):
    """Parameters under names with points, the units that ``fully_shard`` is given."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for path, tensor in tensors.items():
            *parents, name = path.split(".")
            module: nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.register_parameter(name, nn.Parameter(tensor))


Place = Callable[[Weight], dict[str, Tensor]]


def _sharded(model: Model, mesh: DeviceMesh, place: Place = _whole, expert_mesh: DeviceMesh | None = None) -> nn.Module:
    """This rank's part of ``model``, each layer one FSDP2 unit; experts on ``expert_mesh``, or left alone."""
    root = _group([*model.first, *model.last], place)
    root.add_module("layers", nn.ModuleList(_group(layer, place) for layer in model.layers))
    for layer in root.get_submodule("layers").children():
        _shard(layer, mesh, expert_mesh)
    _shard(root, mesh, expert_mesh)
    return root


def _group(weights: Iterable[Weight], place: Place) -> Group:
    return Group({name: tensor for weight in weights for name, tensor in place(weight).items()})


def _shard(unit: nn.Module, mesh: DeviceMesh, expert_mesh: DeviceMesh | None) -> None:
    experts = [module for name, module in unit.named_modules() if name == "mlp.experts"]
    if expert_mesh is not None:
        for module in experts:  # dimension 0 is the expert: rank 0 has 4, fewer than there are ranks to share them
            fully_shard(module, mesh=expert_mesh, shard_placement_fn=lambda p: Shard(1))
    alone = {p for module in experts for p in module.parameters()} if expert_mesh is None else set()
    fully_shard(unit, mesh=mesh, ignored_params=alone)


CASES = {
    gpt2: (fsdp, hsdp),
    llama3_8b: (fsdp, hsdp, fsdp_tp, pp_fsdp_tp),
    llama3_70b: (fsdp, hsdp, fsdp_tp, pp_fsdp_tp),
    deepseek_v3: (ep_dtensor, ep_plain),
}

# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sent:
    """The collectives of one call: how many, and the bytes that this rank hands to them."""

    collectives: int
    bytes: int


class Collectives(TorchDispatchMode):
    """Notes the bytes of each collective of this rank, seen at the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func.name().partition("::")
        if library in ("c10d", "_c10d_functional") and not name.startswith("wait"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return func(*args, **(kwargs or {}))

    @property
    def sent(self) -> Sent:
        return Sent(len(self.bytes), sum(self.bytes))


@dataclass(frozen=True, slots=True)
class Finer:
    """A Clipper that needs norms of units: how many there are on all ranks, its construction and its collectives."""

    units: int
    clipper_ms: float
    construction: Sent
    step: Sent


@dataclass(frozen=True, slots=True)
class Figures:
    """One model in one layout on one number of ranks, as rank 0 sees it.

    * ``parameters``: how many tensors this rank holds; ``elements``: of theirs, on this rank.
    * ``first_ms``: the first ``Plan.of``, with new meshes; ``again_ms``: the median of more; ``clipper_ms``:
      ``Clipper(...)`` without checksums of values, which meta tensors lack.
    * ``kept``: bytes that a plan keeps, its pieces included.
    * ``construction``, ``step``: the collectives of ``Clipper(...)`` and of ``clip_()``.
    * ``of_parameters``, ``of_rows``: of Clippers that need norms of these.
    """

    model: str
    layout: str
    world: int
    parameters: int
    elements: int
    first_ms: float
    again_ms: float
    clipper_ms: float
    kept: int
    construction: Sent
    step: Sent
    of_parameters: Finer
    of_rows: Finer

    @property
    def kept_per_parameter(self) -> float:
        return self.kept / self.parameters


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """This process as rank 0 of ``world``."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(model: Model, layout: Callable[[Model, int], Placed], world: int) -> Figures:
    """All figures of one case; the process must be one of ``world`` ranks."""
    placed = layout(model, world)
    gc.collect()
    again = [planning_ms(placed) for _ in range(1 + REPEATS)]
    start = thread_time()
    clipper, construction = constructed(placed)
    clipper_ms = 1e3 * (thread_time() - start)
    pieces = [held.piece for held in held_in([placed.module])]
    return Figures(
        model=model.name,
        layout=layout.__name__,
        world=world,
        parameters=len(pieces),
        elements=sum(piece.here for piece in pieces),
        first_ms=again[0],
        again_ms=median(again[1:]),
        clipper_ms=clipper_ms,
        kept=kept(placed),
        construction=construction,
        step=stepped(clipper),
        of_parameters=finer(placed, "parameter"),
        of_rows=finer(placed, "row"),
    )


def planned(placed: Placed) -> Callable[[], Plan]:
    listed = held_in([placed.module])
    return lambda: Plan.of(listed, 2.0, ClippingGroup.of(None), **placed.written)


def planning_ms(placed: Placed) -> float:
    plan = planned(placed)
    start = thread_time()
    plan()
    return 1e3 * (thread_time() - start)


def kept(placed: Placed) -> int:
    """Bytes that a plan keeps. Its pieces, made before, are counted with it."""
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    plan = planned(placed)()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gc.unfreeze()
    return after - before + plan.weights.nbytes  # tensors are not Python's memory


def constructed(placed: Placed, policy: distclip.Policy | float = 1.0) -> tuple[Clipper, Sent]:
    with Collectives() as collectives:
        clipper = Clipper(placed.module, policy, **placed.written)
    return clipper, collectives.sent


def finer(placed: Placed, per: Literal["parameter", "row"]) -> Finer:
    """What a policy costs that decides for each unit, which stands in the tables of units on all ranks."""
    told = patch("distclip.plan.construction.distinct_texts", texts_of_all)
    with told, patch("distclip.plan.table._count", counted):
        start = thread_time()
        clipper, construction = constructed(placed, Tenths(per))
        ms = 1e3 * (thread_time() - start)
    return Finer(len(clipper.engine.plan.slots.units.names(per)), ms, construction, stepped(clipper))


def texts_of_all(group: ClippingGroup, device: torch.device, mine: str) -> list[str]:
    """In place of ``distinct_texts``, and with its messages: what the other stages, or ranks with experts, would say.

    They are taken to hold as many parameters as rank 0, whose names are the same.
    """
    places = {"pp=0": STAGES, "ep=0": EXPERT}
    texts = [mine.replace(at, f"{at[:-1]}{k}") for at, count in places.items() if at in mine for k in range(count)]
    texts = texts or [mine]
    dist.all_reduce(torch.zeros(group.size, 2, dtype=torch.float64))
    dist.all_reduce(torch.zeros(sum(map(len, texts)), dtype=torch.uint8))
    return texts


def counted(plan: Plan, table: Sequence[Parameter], places: Sequence[int]) -> None:
    """In place of ``_count``, and with its message: a fake group does not add what other ranks have."""
    dist.all_reduce(torch.zeros(len(table), dtype=torch.float64))


def stepped(clipper: Clipper) -> Sent:
    """The collectives of ``clip_()`` in a call that compares no copies. No parameter has a gradient: they run as ever.

    A fake group does not add the other ranks' messages, so they seem to disagree, except in the step whose number makes
    the agreement word 0.
    """
    step = -clipper.engine.plan.code * pow(TAG_STEP, -1, CODES) % CODES
    calls = clipper.engine.progress.calls
    calls.steps, calls.number, calls.compare_in = step, 0, float("inf")
    clipper.engine.progress.streak.warned = True  # of the gradients that are missing
    with Collectives() as collectives:
        clipper.clip_()
    return collectives.sent


# ---- proving what ranks do not share -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proof:
    """What ``verify()`` adds where each rank holds so many ``experts`` that no other has, as rank 0 sees it.

    ``peak``: bytes of Python's memory, and of the messages in it.
    """

    world: int
    experts: int
    ms: float
    peak: int
    sent: Sent


def prove(world: int, experts: int) -> Proof:
    """The process must be one of ``world`` ranks."""
    model = nn.ParameterList(torch.zeros(4) for _ in range(experts))
    plan = Plan.of(held_in([model]), 2.0, ClippingGroup.of(None), layout=lambda name, p: distclip.Layout(1))
    chance = torch.Generator().manual_seed(0)
    holders = list(model.parameters())
    norms = norms_on(plan, [torch.randn(4, generator=chance) for _ in model], range(experts))
    with patch("distclip.ranks.by_key.pass_on", mirrored):
        start = thread_time()
        count_split(plan, holders, norms)
        ms = 1e3 * (thread_time() - start)
        with Collectives() as collectives:
            count_split(plan, holders, norms)
        tracemalloc.start()
        count_split(plan, holders, norms)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return Proof(world, experts, ms, peak + max(collectives.bytes), collectives.sent)


def mirrored(group: ClippingGroup, rows: Tensor, places: int, count: int) -> Tensor:
    """In place of ``pass_on``, and with its message: what the rank behind sends, if it has what this one has, but with
    keys that are at home as far from it as these from here. So has every rank, and what arrives is as much as leaves.
    """
    received = pass_on(group, rows, places, len(rows))
    received.copy_(rows)
    if rows.ndim > 1:
        received[:, 0] += group.size - places
    return received


PROOFS: dict[str, Callable[[Proof], str]] = {
    "ranks": lambda p: str(p.world),
    "experts": lambda p: str(p.experts),
    "time": lambda p: f"{p.ms:.0f} ms",
    "memory": lambda p: f"{p.peak / 1024:.0f} KiB",
    "collectives": lambda p: shown(p.sent),
}

# ---- showing -----------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Figures], str]] = {
    "model": lambda f: f.model,
    "layout": lambda f: f.layout,
    "ranks": lambda f: str(f.world),
    "parameters": lambda f: str(f.parameters),
    "elements here": lambda f: f"{f.elements:.3g}",
    "first plan": lambda f: f"{f.first_ms:.1f} ms",
    "again": lambda f: f"{f.again_ms:.1f} ms",
    "Clipper": lambda f: f"{f.clipper_ms:.0f} ms",
    "kept": lambda f: f"{f.kept / 1024:.0f} KiB",
    "a parameter": lambda f: f"{f.kept_per_parameter:.0f} B",
    "a step": lambda f: shown(f.step),
    "construction": lambda f: shown(f.construction),
    "units": lambda f: str(f.of_parameters.units),
    "their Clipper": lambda f: f"{f.of_parameters.clipper_ms:.0f} ms",
    "their construction": lambda f: shown(f.of_parameters.construction),
    "rows": lambda f: str(f.of_rows.units),
    "rows' Clipper": lambda f: f"{f.of_rows.clipper_ms:.0f} ms",
    "rows' step": lambda f: shown(f.of_rows.step),
}


def shown(sent: Sent) -> str:
    return f"{sent.collectives}, {sent.bytes} B"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "distclip": distclip.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
    }


def show_proofs(experts: Sequence[int], worlds: Sequence[int]) -> None:
    print(row(PROOFS), row("---" for _ in PROOFS), sep="\n")
    for count, world in product(experts, worlds):
        with ranks(world):
            proof = prove(world, count)
        print(row(show(proof) for show in PROOFS.values()), flush=True)


def main(words: Sequence[str]) -> None:
    models = {model().name: model for model in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of ranks, multiples of 128")
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(models))
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--proofs", type=int, nargs="+", metavar="EXPERTS", help="verify() instead, of so many experts")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    if chosen.proofs:
        show_proofs(chosen.proofs, chosen.worlds)
        return
    figures: list[Figures] = []
    print(row(COLUMNS), row("---" for _ in COLUMNS), sep="\n")
    for name in chosen.models:
        for layout in CASES[models[name]]:
            for world in chosen.worlds:
                with ranks(world):
                    figures.append(measure(models[name](), layout, world))
                print(row(show(figures[-1]) for show in COLUMNS.values()), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": machine(), "figures": [*map(asdict, figures)]}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
