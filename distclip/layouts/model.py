"""What a rank holds of a model: its pieces, whatever wrapped it, and whether they are still there. No collective."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import LayoutError
from .fsdp1 import held_by_fsdp1, is_flattened
from .fsdp2 import managed_anywhere, managed_parameters
from .outputs import layers_of, output_dims
from .piece import Held, held_parameter, holders_of, once
from .refusals import BY_ITS_PARAMETERS, not_a_module, optimizer_as_model, parameters_replaced, part_of_flat

ParameterFilter: TypeAlias = Callable[[str, Tensor], bool]
"""Chooses parameters by name."""

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def parts_of(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that ``model`` is; ValueError for anything else."""
    if isinstance(model, Optimizer):
        raise optimizer_as_model(type(model).__name__)
    if not isinstance(model, (nn.Module, Iterable)):
        raise not_a_module(type(model).__name__)
    parts: list[Any] = [model] if isinstance(model, nn.Module) else list(model)
    for part in parts:
        if isinstance(part, (Tensor, tuple)):
            raise ValueError(BY_ITS_PARAMETERS)
        if not isinstance(part, nn.Module):
            raise not_a_module(type(part).__name__, " in it")
    return parts


def held_in(models: Iterable[nn.Module]) -> list[Held]:
    """The pieces that this rank holds, in the order of their modules; FSDP2 modules are resharded first.

    Names are those of the unwrapped model, prefixed with the number of the part if there are several.
    """
    parts = list(models)
    found: list[Held] = []
    seen: set[nn.Module] = set()
    for number, part in enumerate(parts):
        found.extend(_held_in_part(part, f"{number}." if len(parts) > 1 else "", seen))
    return found


def chosen(listed: Sequence[Held], only: ParameterFilter | None) -> Sequence[Held]:
    """What ``only`` chooses of ``listed``; LayoutError if that cuts a flat gradient of FSDP1."""
    if only is None:
        return listed
    kept = [item for i, item in enumerate(listed) if only(item.piece.label(i), item.holder)]
    clipped, holders = set(map(id, kept)), set(map(id, holders_of(kept)))
    for item in listed:
        if id(item) not in clipped and id(item.holder) in holders:
            raise part_of_flat(item.piece.name)
    return kept


requires_grad = attrgetter("requires_grad")


class Inventory:
    """The parameters that some modules held when it was made, to check in each call that they still do.

    Frozen ones may come and go while they stay frozen, as in a target network that is copied again. Keeps modules and
    parameters alive, as a Clipper does with most of them anyway.
    """

    __slots__ = ("_empty", "_frozen", "_known", "_models", "_shown", "_tables")

    def __init__(self, models: Iterable[nn.Module], holders: Iterable[Tensor]) -> None:
        self._models = list(models)
        self._known = {id(holder): holder for holder in holders}
        self._frozen: list[Tensor] = []  # that have come or gone since
        self._tables: list[dict[str, Any]] | None = None
        self._empty: list[dict[str, Any]] = []  # tables too: to see that they are still empty takes a third of the time
        self._shown: list[Any] = []

    def lost(self) -> LayoutError | None:
        """What is wrong if the modules hold other parameters by now; None if they do not.

        If no module has gained or lost a parameter or a child since the last check that found nothing, the check is
        short: 0.1 us a parameter.
        """
        if self._tables is not None and not any(self._empty) and not any(map(requires_grad, self._frozen)):
            shown = list(chain.from_iterable(map(dict.values, self._tables)))
            if len(shown) == len(self._shown) and all(map(is_, shown, self._shown)):
                return None
        found = once(held_in(self._models))
        copies = managed_anywhere()[1]  # which FSDP2 may show, and of which nothing is known here
        shown = [item for item in found if id(item.holder) not in copies]
        came = [item for item in shown if id(item.holder) not in self._known]
        new = next((item for item in came if item.holder.requires_grad), None)
        here = {id(item.holder) for item in found}
        gone = [] if len(shown) < len(found) else [p for number, p in self._known.items() if number not in here]
        if new is None and not any(p.requires_grad or p.grad is not None for p in gone):
            self._frozen = [*(item.holder for item in came), *gone]
            self._remember()
            return None
        return parameters_replaced(None if new is None else new.piece.name)

    def _remember(self) -> None:
        modules = list(dict.fromkeys(module for model in self._models for module in model.modules()))
        tables: list[Any] = [table for module in modules for table in (module._parameters, module._modules)]
        if not all(isinstance(table, dict) for table in tables):  # those of a ScriptModule are made anew
            self._tables = None
            return
        self._tables, self._empty = list(filter(None, tables)), [table for table in tables if not table]
        self._shown = list(chain.from_iterable(map(dict.values, self._tables)))


def _held_in_part(part: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[Held]:
    """The pieces of one part, without those of FSDP1 modules in ``seen``, to which its own are added.

    [Note: a new sharding] in layouts/__init__.py.
    """
    managed: set[int] = set()
    hidden: list[nn.Parameter] = []
    for path, module in part.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            if module in seen:  # a module listed twice counts once
                continue
            seen.add(module)
            yield from held_by_fsdp1(module, prefix + _clean(f"{path}." if path else ""))
        elif isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward it shows unsharded copies, which have no gradients
            managed |= managed_parameters(module)
        elif isinstance(module, DistributedDataParallel):
            hidden += module._module_parameters  # over tensor parallel it shows none of these after a forward
    names = {p: _clean(name) for name, p in part.named_parameters()}
    layer = {p: owner for module, owner in layers_of(part).items() for _, p in module.named_parameters(recurse=False)}
    if isinstance(part, DistributedDataParallel):
        names = {p: name.removeprefix("module.") for p, name in names.items()}
    for parameter in dict.fromkeys([*names, *hidden]):
        if not is_flattened(parameter):
            name = names.get(parameter)
            dims = output_dims(layer[parameter], parameter.shape) if parameter in layer else (0,)
            yield held_parameter(parameter, f"{prefix}{name}" if name else "", id(parameter) in managed, dims)


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
