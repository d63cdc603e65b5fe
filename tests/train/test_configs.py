"""Every config of the CPU trains, with a smaller model and fewer steps; those for GPUs fit the ranks they ask for."""

from pathlib import Path

import pytest

from distclip.train.axes import Axes
from distclip.train.parse import read_config
from support.ranks import run_ranks
from train.commands import CONFIGS, TINY, metrics, train_here

SMALL = {
    "text": [*TINY, "model.layers=2", "train.batch_size=16"],
    "rows": ["train.epochs=null", "data.max_rows=200", "data.length=20"],
    "digits": ["train.epochs=null"],
}


# test_zero.py runs the other three
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!z]*.yaml")), ids=lambda path: path.stem)
def test_a_config_trains(path: Path, tmp_path: Path):
    config = read_config(path)
    words = [*SMALL[config.task], "train.steps=3", f"run.dir={tmp_path / 'run'}"]
    ranks, fresh = config.parallel.processes, config.parallel.tensor > 1
    assert run_ranks(train_here, ranks, path.name, words, fresh=fresh) == [0] * ranks
    assert [record["skip"] for record in metrics(tmp_path / "run")] == [False] * 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("gpu/*.yaml")), ids=lambda path: path.stem)
def test_a_config_for_gpus_is_the_one_for_the_cpu_made_large(path: Path):
    config, small = read_config(path), read_config(CONFIGS / path.name)
    assert config.train.precision == "bf16"
    assert config.parallel.device == "cuda"  # and refused where there is none
    assert config.parallel.strategy == small.parallel.strategy
    for name in ("replicate", "tensor", "pipeline", "expert"):
        assert (getattr(config.parallel, name) > 1) == (getattr(small.parallel, name) > 1)
    axes = Axes.of(config.parallel, config.parallel.processes)
    microbatches = config.parallel.microbatches or config.parallel.pipeline
    assert config.train.batch_size % (axes.data_size * microbatches) == 0
