"""Every way to spread the model takes the steps of one process, and goes on from what any other has saved."""

from pathlib import Path

import pytest
import torch

from distclip.train.job import build, check
from distclip.train.parse import read_config
from distclip.train.stop import StopSignals
from support.ranks import run_ranks, same_bits
from train.commands import CONFIGS, TINY, metrics, place_here, train_here

STEPS = 10
SMALL = [*TINY, "model.layers=3", "optim.name=sgd", "optim.fused=false", "optim.momentum=0.9", "optim.lr=0.1"]
ALONE = (1, ["parallel.strategy=none"])
WAYS = {
    "ddp": (2, ["parallel.strategy=ddp"]),
    "fsdp2": (2, ["parallel.strategy=fsdp2"]),
    "hsdp": (4, ["parallel.strategy=fsdp2", "parallel.replicate=2"]),
    "pipeline": (3, ["parallel.strategy=none", "parallel.pipeline=3", "parallel.microbatches=4"]),
    "pipeline x ddp": (4, ["parallel.strategy=ddp", "parallel.pipeline=2", "parallel.schedule=gpipe"]),
    "pipeline x fsdp2": (4, ["parallel.strategy=fsdp2", "parallel.pipeline=2"]),
    "ddp x tensor": (4, ["parallel.strategy=ddp", "parallel.tensor=2"]),
    "fsdp2 x tensor": (4, ["parallel.strategy=fsdp2", "parallel.tensor=2"]),
    "pipeline x tensor": (4, ["parallel.strategy=none", "parallel.pipeline=2", "parallel.tensor=2"]),
}
WAYS_OF_EXPERTS = {
    "ddp": (2, ["parallel.strategy=ddp"]),
    "expert": (2, ["parallel.strategy=fsdp2", "parallel.expert=2"]),
    "fsdp2 x expert": (4, ["parallel.strategy=fsdp2", "parallel.expert=2"]),
    "hsdp x expert": (4, ["parallel.strategy=fsdp2", "parallel.replicate=2", "parallel.expert=2"]),
    "pipeline x expert": (4, ["parallel.strategy=fsdp2", "parallel.pipeline=2", "parallel.expert=2"]),
}
MODELS = {"dense": (WAYS, []), "experts": (WAYS_OF_EXPERTS, ["model.experts=4", "model.top_k=2"])}
CASES = [(model, way) for model, (ways, _) in MODELS.items() for way in ways]


def run(folder: Path, way: tuple[int, list[str]], *words: str) -> None:
    ranks, parallel = way
    words = [*SMALL, *parallel, *words, f"run.dir={folder}", f"parallel.processes={ranks}"]
    # DTensor's cached plans name process groups, of which each run has others
    fresh = any(word.startswith("parallel.tensor") for word in parallel)
    codes = run_ranks(train_here, ranks, "quickstart.yaml", words, fresh=fresh)
    assert codes == [0] * ranks


def assert_same(folder: Path, reference: Path, rel: float = 1e-6) -> None:
    records, others = metrics(folder), metrics(reference)
    assert [record["step"] for record in records] == [record["step"] for record in others]
    watched = [name for name in others[0] if name.startswith("norm/")]
    for record, other in zip(records, others, strict=True):
        assert {name for name in record if name.startswith("norm/")} == set(watched)
        for name in ("loss", "norm", "max_norm", "coef", "accuracy", *watched):
            assert record[name] == pytest.approx(other[name], rel=rel), (name, record["step"])
    assert records[-1]["held_out_loss"] == pytest.approx(others[-1]["held_out_loss"], rel=rel)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process's run of some steps, of each model."""
    folders = {}

    def folder(model: str, *words: str) -> Path:
        if (model, words) not in folders:
            folders[model, words] = tmp_path_factory.mktemp(model) / "alone"
            run(folders[model, words], ALONE, *MODELS[model][1], *words)
            clipped = {record["coef"] < 1 for record in metrics(folders[model, words])}
            assert clipped == {True, False}, "no step was above the bound, or none below"
        return folders[model, words]

    return folder


@pytest.mark.parametrize(("model", "name"), CASES, ids=str)
def test_a_way_takes_the_steps_of_one_process(model, name, alone, tmp_path: Path):
    ways, of_model = MODELS[model]
    words = ["clip.max_norm=1.0", "clip.watch=parameters", f"train.steps={STEPS}"]
    run(tmp_path / "run", ways[name], *of_model, *words)
    assert_same(tmp_path / "run", alone(model, *words))
    assert "norm/head.weight" in metrics(tmp_path / "run")[0]


@pytest.mark.parametrize("model", MODELS)
def test_a_way_goes_on_from_what_another_has_saved(model, alone, tmp_path: Path):
    """Two steps each, in one run folder, with a policy whose bound comes from all steps before."""
    ways, of_model = MODELS[model]
    words = [*of_model, "clip.policy=autoclip", "clip.max_norm=null", "clip.window=5", "clip.percentile=50"]
    turns = [*ways.values(), ALONE]
    for turn, way in enumerate(turns, start=1):
        run(tmp_path / "run", way, *words, f"train.steps={2 * turn}", *["resume=true"][: turn - 1])
    straight = alone(model, *words[len(of_model) :], f"train.steps={2 * len(turns)}")
    assert_same(tmp_path / "run", straight, rel=3e-6)
    assert len({record["max_norm"] for record in metrics(straight)}) > 4


def verified(cases: list[list[str]]) -> list[float]:
    """Let the Clipper of every case prove its layout on the gradients of a batch; the norms."""
    norms = []
    for words in cases:
        config, place = read_config(CONFIGS / "quickstart.yaml", [*SMALL, *words]), place_here()
        trainer = build(config, check(config, place.world), place, StopSignals())
        trainer.passes.forward_backward(*trainer.batches.at(0))
        trainer.held.clipper.verify()
        norms.append(trainer.held.clipper.measure().norm.item())
    return norms


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_layout_of_every_way_is_proved_on_gradients(ranks):
    for ways, of_model in MODELS.values():
        cases = [[*of_model, *words, f"parallel.processes={size}"] for size, words in ways.values() if size == ranks]
        norms = run_ranks(verified, ranks, cases, fresh=True)
        assert same_bits(norms)
        assert norms[0] == pytest.approx([norms[0][0]] * len(cases) if cases else [], rel=1e-6)


def dtypes_of(cases: list[list[str]]) -> list[tuple[set[torch.dtype], float, float]]:
    """In each case: of parameters and gradients; the loss and the norm of a batch."""
    found = []
    for words in cases:
        config, place = read_config(CONFIGS / "quickstart.yaml", [*SMALL, *words]), place_here()
        trainer = build(config, check(config, place.world), place, StopSignals())
        record, _ = trainer.step(0)
        trainer.passes.forward_backward(*trainer.batches.at(1))
        parameters = list(trainer.held.model.parameters())
        found.append(({t.dtype for p in parameters for t in (p, p.grad)}, record["loss"], record["norm"]))
    return found


def test_bf16_computes_in_bf16_and_keeps_fp32():
    ways = [
        *(WAYS[name][1] for name in ("ddp", "fsdp2")),
        ["parallel.strategy=fsdp2", "parallel.pipeline=2"],
        ["parallel.strategy=none", "parallel.pipeline=2"],
        ["parallel.strategy=fsdp2", "parallel.tensor=2"],
        ["parallel.strategy=none", "parallel.tensor=2"],
        [*WAYS_OF_EXPERTS["expert"][1], "model.experts=4"],
    ]
    precisions = [f"train.precision={precision}" for precision in ("fp32", "bf16")]
    cases = [[*words, each, "parallel.processes=2"] for words in ways for each in precisions]
    found, _ = run_ranks(dtypes_of, 2, cases, fresh=True)
    assert {dtype for dtypes, *_ in found for dtype in dtypes} == {torch.float32}
    for words, (_, *fp32), (_, *bf16) in zip(ways, found[::2], found[1::2], strict=True):
        assert bf16 == pytest.approx(fp32, rel=2e-2), words
        assert bf16 != pytest.approx(fp32, rel=1e-6), words
