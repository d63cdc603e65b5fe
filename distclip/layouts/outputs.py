"""Which dimensions of a parameter number the outputs of its layer, by the kind of the module that has it.

Private torch API, read in 2.13 and 2.6: ``_ConvNd`` and ``_ConvTransposeNd``, of which all convolutions are.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def output_dims(layer: nn.Module, shape: torch.Size) -> tuple[int, ...]:
    """Those of a parameter of this ``shape`` that ``layer`` has, ascending.

    With ``groups`` an index of a transposed convolution is an output of each group.
    """
    if len(shape) > 1 and isinstance(layer, _ConvTransposeNd):
        return (1,)
    return (0, 1) if len(shape) == 3 and not isinstance(layer, (_ConvNd, nn.Bilinear)) else (0,)


def layers_of(model: nn.Module) -> Mapping[nn.Module, nn.Module]:
    """The layer that each module is or, as one of weight_norm, makes a parameter for."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, nn.Module] = {}
    for path, module in modules.items():
        before, parametrizes, _ = f".{path}".rpartition(".parametrizations.")
        found.setdefault(module, modules[before[1:]] if parametrizes else module)
    return found
