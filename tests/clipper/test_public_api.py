"""What `import distclip` promises. A new name, argument or default is a decision: it is made here as well."""

import inspect
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
import torch

import distclip
from support.ranks import LIMIT

ROOT = Path(__file__).parents[2]
SIGNATURES = {
    "AGC": "(clipping=0.01, eps=0.001, exempt=(), unit_dims=())",
    "AdaGC": "(lambda_abs=1.0, lambda_rel=1.05, beta=0.98, warm_up=100)",
    "AutoClip": "(percentile=10, window=1000, max_norm=inf)",
    "Clipper": "(model, policy, *, group=None, split_over=(), layout=None, only=None, norm_type=2.0, nonfinite='skip',"
    " max_consecutive_skips=None, gradients=None, watch=None, watch_zeros=False, exact=False, fingerprint_every=None,"
    " verify_every=None, on_drift=None)",
    "Clipper.clip_": "(self, *, signals=None)",
    "Clipper.fingerprint": "(self)",
    "Clipper.history": None,
    "Clipper.load_state_dict": "(self, state)",
    "Clipper.measure": "(self, *, signals=None)",
    "Clipper.register_report_hook": "(self, hook)",
    "Clipper.state_dict": "(self)",
    "Clipper.step": "(self, *optimizers, scaler=None, signals=None)",
    "Clipper.steps": None,  # a property
    "Clipper.verify": "(self)",
    "Chain": "(*policies)",
    "Cosine": "(start, end, steps)",
    "Decision": "(max_norm, skip=None, bounds=None, coef=None, per='model', extra=<factory>)",
    "Fingerprint": "(total, parameters, differ=())",
    "Fingerprint.to_dict": "(self)",
    "History": "(steps=0, clipped=0, skipped=0, nonfinite=0, longest_skips=0, current_skips=0, largest=0.0,"
    " largest_step=0, _norms=<factory>)",
    "History.quantile": "(self, q)",
    "History.to_dict": "(self)",
    "Layout": "(replicas, *, parts=False)",
    "Layout.cut": "(over=(), *, parts=(), group=None)",
    "LayoutError": None,  # an exception: its arguments are Python's
    "MaxNorm": "(max_norm)",
    "MaxRMS": "(max_rms=1.0)",
    "NonFiniteError": None,
    "Normalize": "(norm)",
    "PerGroup": "(groups)",
    "PerParameter": "(policy)",
    "Policy": None,  # a protocol: its methods are tested beside the policies
    "QuantileTracker": "(quantile=0.5, eta=0.2, max_norm=inf)",
    "Report": "(norm, max_norm, coef, skip, culprit=None, norms=<factory>, extra=<factory>, zeros=<factory>,"
    " fingerprint=None)",
    "Report.to_dict": "(self)",
    "Statistic": "(per='model', of='gradient', groups=(), dims=())",
    "Shadow": "(acting, /, **others)",
    "Signal": "(name)",
    "SkipSpikes": "(max_norm=inf, sigma=6.0, window=128, patience=16, on=('norm',))",
    "Smooth": "(max_norm)",
    "Statistics": "(norm, units, slots=None, p=2.0, scale=1.0, signals=None)",
    "Statistics.norm": "(self, statistic=None)",
    "Units": "(size=0.0, levels=None, p=2.0)",
    "Units.level": "(self, statistic)",
    "Units.names": "(self, statistic)",
    "Units.shape": "(self, statistic=None)",
    "Units.sizes": "(self, statistic)",
    "ValueClip": "(clip_value)",
    "Warmup": "(start, end, steps)",
    "ZClip": "(alpha=0.97, z_thresh=2.5, max_norm=1.0, eps=1e-06, warmup_steps=25)",
    "attach": "(optimizers, model, policy, **options)",
    "clip_grad_norm_": "(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None, *, group=None,"
    " split_over=(), layout=None, exact=False)",
    "clip_grad_value_": "(parameters, clip_value, foreach=None)",
    "clip_grads_with_norm_": "(parameters, max_norm, total_norm, foreach=None)",
    "find_source": "(model, *, group=None)",
    "get_total_norm": "(tensors, norm_type=2.0, error_if_nonfinite=False, foreach=None, *, group=None, split_over=(),"
    " exact=False)",
}


def public(name: str) -> object:
    value = distclip
    for part in name.split("."):
        value = getattr(value, part)
    return value


def signature(function: object) -> str:
    """The names, order and defaults of the arguments, without annotations."""
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_public_names_are_exactly_these():
    exported = {
        name for name, value in vars(distclip).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert exported == {name for name in SIGNATURES if "." not in name}


@pytest.mark.parametrize("name", [name for name, expected in SIGNATURES.items() if expected])
def test_a_signature_is_a_promise(name):
    assert signature(public(name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"])
def test_a_function_can_take_the_place_of_torchs(name):
    ours = inspect.signature(public(name)).parameters.values()
    torchs = inspect.signature(getattr(torch.nn.utils, name)).parameters.values()
    positional = [(p.name, p.kind, p.default) for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == [(p.name, p.kind, p.default) for p in torchs]


@pytest.mark.parametrize("name", SIGNATURES)
def test_everything_public_says_what_it_is(name):
    text = inspect.getdoc(public(name)) or ""
    assert text.strip()
    assert not text.startswith(f"{name}("), "this is the line that dataclasses write by themselves"


def test_errors_are_the_ones_python_programmers_expect():
    assert issubclass(distclip.LayoutError, ValueError)
    assert issubclass(distclip.NonFiniteError, RuntimeError)


def test_the_installed_version_is_the_one_in_the_source():
    try:
        installed = version("distclip")
    except PackageNotFoundError:
        pytest.skip("distclip runs from its source folder and is not installed")
    assert distclip.__version__ == installed


def test_importing_distclip_imports_torch_and_nothing_else():
    program = """
import json, sys
import torch.distributed.fsdp, torch.distributed.tensor
before = set(sys.modules)
import distclip
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True
    )
    new = json.loads(done.stdout)
    assert {name.partition(".")[0] for name in new} <= {"distclip", "torch", *sys.stdlib_module_names}
    assert not {"distclip.train", "distclip.integrations", "distclip.cli"} & set(new)
