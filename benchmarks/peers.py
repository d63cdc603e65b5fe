"""Our AGC and MaxRMS beside those of optax and timm, on one process: the same numbers, or a named difference.

    python benchmarks/peers.py

Installs optax (with jax, about 620 MB) and timm into a virtual environment in a temporary folder, or in ``--folder``,
which is used again. Of timm only the module ``timm.utils.agc`` is read: all of it needs torchvision. Ends with 1
where a number is not as expected.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import distclip

Arrays: TypeAlias = Mapping[str, Tensor]
SAME = 1e-6  # relative; both compute in fp32

BY_OPTAX = """
import json, sys
import jax.numpy as jnp
import optax

def run(case):
    arrays = {kind: {name: jnp.array(value, case["dtype"]) for name, value in case[kind].items()}
              for kind in ("parameters", "gradients")}
    chosen = getattr(optax, case["function"])(*case["arguments"])
    updates, _ = chosen.update(arrays["gradients"], chosen.init(arrays["parameters"]), arrays["parameters"])
    return {name: value.astype(jnp.float32).tolist() for name, value in updates.items()}

json.dump({"version": optax.__version__, "found": [run(case) for case in json.load(sys.stdin)]}, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. ``same``: whether equal numbers are expected; ``why``: what else is.

    ``jax``: in which order optax wants the dimensions of each parameter that it wants otherwise.
    """

    what: str
    policy: distclip.AGC | distclip.MaxRMS
    model: nn.Module
    same: bool = True
    why: str = ""
    dtype: torch.dtype = torch.float32
    gradients: float = 1.0
    jax: Callable[[Tensor], tuple[int, ...]] = lambda tensor: tuple(range(tensor.ndim))
    peers: tuple[str, ...] = ("optax", "timm")

    def arrays(self) -> tuple[Arrays, Arrays]:
        """Parameters, one of them all zeros, and gradients of very different sizes."""
        torch.manual_seed(0)
        parameters = {name: torch.randn(p.shape).to(self.dtype) for name, p in self.model.named_parameters()}
        for name in [name for name in parameters if name.endswith("bias")]:
            parameters[name].zero_()
        sizes = {name: 10.0 ** (k % 5 - 2) * self.gradients for k, name in enumerate(parameters)}
        return parameters, {name: (torch.randn(p.shape) * sizes[name]).to(self.dtype) for name, p in parameters.items()}


def flipped(tensor: Tensor) -> tuple[int, ...]:
    """Outputs last, as in JAX: (out, in, ...) as (..., in, out)."""
    return (*range(2, tensor.ndim), 1, 0) if tensor.ndim > 1 else tuple(range(tensor.ndim))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, groups=2))


CASES = [
    Case("AGC, Linear and LayerNorm", distclip.AGC(), perceptron(), jax=flipped),
    Case("AGC(0.16), Linear and LayerNorm", distclip.AGC(0.16), perceptron(), jax=flipped),
    Case("AGC(0.05, eps=0.1), Conv2d and BatchNorm", distclip.AGC(0.05, eps=0.1), convolutions(), jax=flipped),
    Case("AGC, Conv1d", distclip.AGC(), nn.Conv1d(3, 4, 5), peers=("timm",)),
    Case("MaxRMS", distclip.MaxRMS(), perceptron(), peers=("optax",)),
    Case("MaxRMS(0.01)", distclip.MaxRMS(0.01), convolutions(), peers=("optax",)),
    Case(
        "AGC, Conv1d",
        distclip.AGC(),
        nn.Conv1d(3, 4, 5),
        same=False,
        why="optax takes the norm over the positions alone: each pair of an input and an output is a unit",
        jax=flipped,
        peers=("optax",),
    ),
    Case(
        "AGC, ConvTranspose2d",
        distclip.AGC(),
        nn.ConvTranspose2d(3, 4, 2),
        same=False,
        why="timm takes inputs for outputs, which are dim 1 there",
        peers=("timm",),
    ),
    Case(
        "AGC(1e-4), gradients around 1e-6",
        distclip.AGC(1e-4),
        nn.LayerNorm(8),
        same=False,
        why="both divide by at least 1e-6, and so clip small gradients to less than their bound",
        gradients=3e-6,
    ),
    Case(
        "AGC, gradients beyond 1e19",
        distclip.AGC(),
        nn.Linear(7, 5),
        same=False,
        why="their squares overflow fp32, and both make zeros of these gradients",
        gradients=1e22,
        jax=flipped,
    ),
    Case(
        "MaxRMS, gradients beyond 1e19",
        distclip.MaxRMS(),
        nn.Linear(7, 5),
        same=False,
        why="as before",
        gradients=1e22,
        peers=("optax",),
    ),
    Case(
        "AGC, bf16",
        distclip.AGC(),
        perceptron(),
        same=False,
        why="both round norms and factors to bf16; we round once, the product",
        dtype=torch.bfloat16,
        jax=flipped,
    ),
]


def by_distclip(case: Case) -> Arrays:
    parameters, gradients = case.arrays()
    model = case.model.to(case.dtype)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(parameters[name])
        parameter.grad = gradients[name].clone()
    distclip.Clipper(model, case.policy).clip_()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.float() for name, gradient in found.items()}


def by_timm(case: Case, module: Any) -> Arrays:
    parameters, gradients = case.arrays()
    assert isinstance(case.policy, distclip.AGC)
    leaves = {name: nn.Parameter(value) for name, value in parameters.items()}
    for name, leaf in leaves.items():
        leaf.grad = gradients[name]
    module.adaptive_clip_grad(leaves.values(), clip_factor=case.policy.clipping, eps=case.policy.eps)
    return {name: leaf.grad.float() for name, leaf in leaves.items() if leaf.grad is not None}


def for_optax(case: Case) -> dict[str, Any]:
    policy = case.policy
    is_agc = isinstance(policy, distclip.AGC)
    turned = [{name: t.permute(case.jax(t)).tolist() for name, t in arrays.items()} for arrays in case.arrays()]
    return {
        "function": "adaptive_grad_clip" if is_agc else "clip_by_block_rms",
        "arguments": [policy.clipping, policy.eps] if isinstance(policy, distclip.AGC) else [policy.max_rms],
        "dtype": str(case.dtype).removeprefix("torch."),
        "parameters": turned[0],
        "gradients": turned[1],
    }


def from_optax(case: Case, found: Mapping[str, Any]) -> Arrays:
    orders = {name: case.jax(value) for name, value in case.arrays()[0].items()}
    return {name: torch.tensor(value).permute(sorted_places(orders[name])) for name, value in found.items()}


def sorted_places(order: tuple[int, ...]) -> list[int]:
    """The order that undoes this one."""
    return sorted(range(len(order)), key=order.__getitem__)


def apart(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference, beside the larger of both numbers."""
    most = 0.0
    for name, a in ours.items():
        b = theirs[name]
        size = torch.maximum(a.abs(), b.abs())
        most = max(most, ((a.double() - b.double()).abs() / size.double().clamp(min=1e-300)).max().item())
    return most


def installed(folder: Path) -> Path:
    """The Python of a virtual environment with optax and timm in ``folder``."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    for words in (["optax"], ["--no-deps", "timm"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], check=True)
    return python


def agc_of_timm(folder: Path) -> Any:
    (utils,) = folder.glob("lib/python*/site-packages/timm/utils")
    spec = PathFinder.find_spec("agc", [str(utils)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(folder: Path) -> int:
    python, wrong = installed(folder), 0
    on_optax = [case for case in CASES if "optax" in case.peers]
    asked = json.dumps([for_optax(case) for case in on_optax])
    done = subprocess.run([python, "-c", BY_OPTAX], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout)
    (version,) = (path.name.split("-")[1] for path in folder.glob("lib/python*/site-packages/timm-*.dist-info"))
    print(f"optax {answer['version']}, timm {version.removesuffix('.dist')}, torch {torch.__version__}\n")
    print("| case | peer | largest relative difference | |\n| --- | --- | --- | --- |")
    timm = agc_of_timm(folder)
    by_optax = dict(zip(map(id, on_optax), answer["found"], strict=True))
    for case in CASES:
        ours = by_distclip(case)
        for peer in case.peers:
            theirs = from_optax(case, by_optax[id(case)]) if peer == "optax" else by_timm(case, timm)
            found = apart(ours, theirs)
            expected = (found <= SAME) == case.same
            wrong += not expected
            print(f"| {case.what} | {peer} | {found:.1e} | {'' if expected else 'NOT EXPECTED: '}{case.why} |")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the virtual environment; kept")
    folder = parser.parse_args().folder
    if folder is not None:
        return compare(folder)
    with tempfile.TemporaryDirectory() as new:
        return compare(Path(new))


if __name__ == "__main__":
    sys.exit(main())
