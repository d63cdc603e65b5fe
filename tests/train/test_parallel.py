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
WATCH = "clip.watch=parameters"
SMALL = [*TINY, "model.layers=3", "optim.name=sgd", "optim.fused=false", "optim.momentum=0.9", "optim.lr=0.1"]
ALONE = ["parallel.strategy=none"]
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
SIZES = [2, 3, 4]
THOROUGH = [("dense", "pipeline x fsdp2"), ("dense", "ddp x tensor"), ("experts", "ddp"), ("experts", "fsdp2 x expert")]


def train_all(runs: list[list[str]]) -> list[int]:
    """One run after another on ranks that stay: most of a tiny run is what a process does for the first time."""
    return [train_here("quickstart.yaml", words) for words in runs]


def launch(fn, ranks: int, runs: list[list[str]]):
    """What ``fn`` makes of the words of these runs, on each rank."""
    words = [[*SMALL, *words, f"parallel.processes={ranks}"] for words in runs]
    # DTensor's cached plans name process groups, of which each launch has others
    return run_ranks(fn, ranks, words, fresh=True)


def run(ranks: int, *runs: list[str]) -> None:
    assert launch(train_all, ranks, runs) == [[0] * len(runs)] * ranks


def cases_of(size: int, but: list[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    """The words of each way on so many ranks, by its model and name."""
    return {
        (model, name): [*of_model, *words]
        for model, (ways, of_model) in MODELS.items()
        for name, (ranks, words) in ways.items()
        if ranks == size and (model, name) not in but
    }


def assert_same(folder: Path, reference: Path, rel: float = 1e-6, of_watched: float = 1e-6) -> None:
    records, others = metrics(folder), metrics(reference)
    assert [record["step"] for record in records] == [record["step"] for record in others]
    watched = [name for name in others[0] if name.startswith("norm/")]
    assert "norm/head.weight" in watched
    for record, other in zip(records, others, strict=True):
        assert {name for name in record if name.startswith("norm/")} == set(watched)
        for name in ("loss", "norm", "max_norm", "coef", "accuracy", *watched):
            bound = of_watched if name in watched else rel
            assert record[name] == pytest.approx(other[name], rel=bound), (name, record["step"])
    assert records[-1]["held_out_loss"] == pytest.approx(others[-1]["held_out_loss"], rel=rel)


def alone(folder: Path, *words: str) -> dict[str, Path]:
    """The folder of one process's run, of each model."""
    found = {model: folder / "alone" / model for model in MODELS}
    run(1, *([*ALONE, *MODELS[model][1], *words, f"run.dir={place}"] for model, place in found.items()))
    for place in found.values():
        clipped = {record["coef"] < 1 for record in metrics(place)}
        assert clipped == {True, False}, "no step was above the bound, or none below"
    return found


def verified(runs: list[list[str]]) -> list[float]:
    """Let the Clipper of every run prove its layout on the gradients of a batch; the norms."""
    norms = []
    for words in runs:
        anew = [word for word in words if not word.startswith(("run.dir=", "resume="))]
        config, place = read_config(CONFIGS / "quickstart.yaml", anew), place_here()
        trainer = build(config, check(config, place.world), place, StopSignals())
        trainer.passes.forward_backward(*trainer.batches.at(0))
        trainer.held.clipper.verify()
        norms.append(trainer.held.clipper.measure().norm.item())
    return norms


def train_and_verify(runs: list[list[str]]) -> list[float]:
    assert train_all(runs) == [0] * len(runs)
    return verified(runs)


@pytest.mark.parametrize("but", [THOROUGH, pytest.param([], marks=pytest.mark.thorough)], ids=["sample", "all"])
def test_every_way_is_proved_on_gradients_and_goes_on_from_what_another_has_saved(but, tmp_path: Path):
    """Two steps each, in one run folder, with a policy whose bound comes from all steps before."""
    words = ["clip.policy=autoclip", "clip.max_norm=null", "clip.window=5", "clip.percentile=50", WATCH]
    taken, norms = dict.fromkeys(MODELS, 0), {}
    for size in SIZES:
        runs, cases = [], cases_of(size, but)
        for (model, _), way in cases.items():
            resume = ["resume=true"] if taken[model] else []
            taken[model] += 2
            runs.append([*way, *words, f"run.dir={tmp_path / model}", f"train.steps={taken[model]}", *resume])
        found = launch(train_and_verify, size, runs)
        assert same_bits(found)
        norms |= zip(cases, found[0], strict=True)
    assert len(norms) == len(WAYS) + len(WAYS_OF_EXPERTS) - len(but)
    words.append(f"train.steps={max(taken.values()) + 2}")
    ends = [[*of_model, f"run.dir={tmp_path / model}"] for model, (_, of_model) in MODELS.items()]
    run(1, *([*ALONE, *end, *words, "resume=true"] for end in ends))
    straight = alone(tmp_path, *words)
    for model, folder in straight.items():
        assert_same(tmp_path / model, folder, rel=3e-6, of_watched=1e-5)
        assert len({record["max_norm"] for record in metrics(folder)}) > 4
        first = metrics(folder)[0]["norm"]
        assert all(norm == pytest.approx(first, rel=1e-6) for (each, _), norm in norms.items() if each == model)


@pytest.mark.thorough
def test_every_way_takes_the_steps_of_one_process(tmp_path: Path):
    words = ["clip.max_norm=1.0", WATCH, f"train.steps={STEPS}"]
    straight = alone(tmp_path, *words)
    for size in SIZES:
        cases = cases_of(size, [])
        run(size, *([*way, *words, f"run.dir={tmp_path / model / name}"] for (model, name), way in cases.items()))
        for model, name in cases:
            assert_same(tmp_path / model / name, straight[model])


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
