"""What `--model package.module:build` names: a function of the user's that builds the model, and runs a backward.

Whatever it raises is the user's to mend: one line says what and where.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import distclip
from distclip import Clipper, LayoutError, NonFiniteError
from distclip.doctor import refusals
from distclip.doctor.finding import Unusable
from distclip.ranks.lost_ranks import of_backend

NOT_THEIRS = tuple(str(Path(package.__file__ or "").parent) + os.sep for package in (torch, distclip))


@dataclass(kw_only=True, slots=True, frozen=True)
class Target:
    """What ``build()`` returned, told apart by type; ``backward`` is None where there was none."""

    clipper: Clipper
    optimizers: Sequence[Optimizer]
    backward: Callable[[], object] | None


def build(name: str) -> Target:
    """Call the function of this name. Unusable where it cannot be imported or returns no module.

    RuntimeError where it fails, with the line; errors of ours and of the backend as they are.
    """
    return sorted_out(name, called(imported(name), f"{name}()"))


def called(function: Callable[[], Any], name: str) -> Any:
    """What a function of the user's returns."""
    try:
        return function()
    except (KeyboardInterrupt, LayoutError, NonFiniteError):
        raise
    except BaseException as error:
        if of_backend(error):
            raise
        raise RuntimeError(refusals.not_called(name, error, place_of(error))) from error


def imported(name: str) -> Callable[[], Any]:
    """The function ``package.module:function``, of what can be imported from here and the current folder."""
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Unusable(refusals.not_imported(module_name, error)) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise Unusable(refusals.no_such_name(module_name, path))
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise Unusable(refusals.no_function(name, found))
    return found  # type: ignore[no-any-return]


def sorted_out(name: str, returned: Any) -> Target:
    """What ``build()`` returned, by type: modules or a Clipper of them, optimizers, a function."""
    items = flat(returned)
    modules = [item for item in items if isinstance(item, nn.Module)]
    clippers = [item for item in items if isinstance(item, Clipper)]
    optimizers = [item for item in items if isinstance(item, Optimizer)]
    others = [item for item in items if not isinstance(item, (nn.Module, Clipper, Optimizer))]
    strangers = [item for item in others if not callable(item)]
    if strangers or not (modules or clippers) or len(clippers) > 1 or len(others) > 1:
        raise Unusable(refusals.no_model(name, strangers[0] if strangers else returned))
    clipper = clippers[0] if clippers else Clipper(modules, 1.0)
    return Target(clipper=clipper, optimizers=optimizers, backward=next(iter(others), None))


def flat(returned: Any) -> list[Any]:
    """The items of tuples and lists, but for those in modules that are sequences."""
    if isinstance(returned, (tuple, list)):
        return [item for each in returned for item in flat(each)]
    return [returned]


def place_of(error: BaseException) -> str:
    """The last line of the user's own that led to it, as errors end."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THEIRS)]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
