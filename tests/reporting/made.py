"""Runs as our trainer writes them, made up: a level with noise, spikes of one layer, a NaN."""

import json
from pathlib import Path

import numpy as np

CULPRIT = "blocks.1.mlp.weight on rank 1 has NaN in its gradient"
LAYERS = ("tokens.weight", "blocks.0.mlp.weight", "blocks.1.mlp.weight", "head.weight")
SPIKES = (150, 290, 520)
BAD = 400


def write_run(folder: Path, *, steps: int = 600, bound: float = 1.5, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    layers = {name: np.exp(random.normal(0, 0.2, steps)) / 2 for name in LAYERS}
    layers[LAYERS[2]][[step - 1 for step in SPIKES if step <= steps]] *= 30
    norms = np.sqrt(sum(values**2 for values in layers.values()))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for row, norm in enumerate(norms.tolist()):
            record = {"step": row + 1, "loss": 3 - row / steps, "norm": norm, "max_norm": bound}
            record |= {"coef": min(1.0, bound / norm), "skip": False}
            record |= {f"norm/{name}": float(values[row]) for name, values in layers.items()}
            if row + 1 == BAD:
                record |= {"norm": "NaN", "coef": "NaN", "skip": True, f"norm/{LAYERS[2]}": "NaN", "culprit": CULPRIT}
            file.write(json.dumps(record) + "\n")
    return folder
