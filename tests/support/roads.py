"""Where a Clipper's decisions are read: at once on the host, or, as on accelerators, one call later."""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from distclip import Clipper, Policy
from distclip.step.engine import Engine


def clipper_on_device(model: nn.Module | Sequence[nn.Module], policy: Policy | float, **options: Any) -> Clipper:
    """A Clipper that leaves its decisions where the norm is reduced, as on an accelerator, though that is the CPU."""
    return Clipper.of(Engine(model, policy, decides_on_device=True, **options))


ROADS = {"host": Clipper, "device": clipper_on_device}


@pytest.fixture(params=ROADS.values(), ids=ROADS)
def clipper_of(request: pytest.FixtureRequest) -> Any:
    """Builds a Clipper, of either kind."""
    return request.param
