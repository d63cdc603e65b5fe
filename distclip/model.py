"""What a rank holds of a model: its pieces, whatever wrapped it, and whether it holds them still. No collective."""

from collections.abc import Iterable, Iterator, Sequence
from weakref import ref

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from .errors import LayoutError
from .fsdp1 import held_by_fsdp1, is_flattened
from .fsdp2 import managed_anywhere, managed_parameters
from .piece import Held, held_parameter, holders_of, once

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def parts_of(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that ``model`` is; ValueError for anything else."""
    parts: Iterable[nn.Module] = [model] if isinstance(model, nn.Module) else model
    parts = list(parts)
    for part in parts:
        if not isinstance(part, nn.Module):
            raise ValueError(f"model must be a module or a list of modules, got {type(part).__name__} in it")
    return parts


def held_in(models: Iterable[nn.Module]) -> list[Held]:
    """What this rank holds of the parts it has, in the order of their modules; FSDP2 modules are resharded first.

    Names are those of the unwrapped model, with the number of the part before them where there are several.
    """
    parts = list(models)
    found: list[Held] = []
    seen: set[nn.Module] = set()
    for number, part in enumerate(parts):
        found.extend(_held_in_part(part, f"{number}." if len(parts) > 1 else "", seen))
    return found


class Reading:
    """The parameters that some modules held when they were read, to see in a first step whether they still do."""

    __slots__ = ("_ids", "_models", "_seen")

    def __init__(self, models: Iterable[nn.Module], holders: Iterable[Tensor]) -> None:
        """``holders`` are kept alive by the caller, modules by nobody."""
        self._models = [ref(model) for model in models]
        self._ids = frozenset(map(id, holders))
        self._seen = False

    def lost(self) -> LayoutError | None:
        """What is wrong where the modules hold others by now; None once they did not, or if a module is gone.

        FSDP2 may show unsharded copies, of which nothing is known here.
        """
        if self._seen:
            return None
        models = [model for model in (reference() for reference in self._models) if model is not None]
        if len(models) < len(self._models):
            return None
        found = once(held_in(models))
        copies = managed_anywhere()[1]
        shown = [item for item in found if id(item.holder) not in copies]
        new = next((item for item in shown if id(item.holder) not in self._ids), None)
        if new is None and (len(shown) < len(found) or len(holders_of(found)) == len(self._ids)):
            self._seen = True
            return None
        what = "lost parameters" if new is None else f"has another {new.piece.name}"
        return LayoutError(
            f"the model {what} since the Clipper was built: build it after fully_shard, load_state_dict(assign=True) "
            "and whatever else replaces or adds parameters"
        )


def _held_in_part(part: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[Held]:
    """What one part holds, without those of FSDP1 modules in ``seen``, to which its own are added."""
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
    if isinstance(part, DistributedDataParallel):
        names = {p: name.removeprefix("module.") for p, name in names.items()}
    for parameter in dict.fromkeys([*names, *hidden]):
        if not is_flattened(parameter):
            name = names.get(parameter)
            yield held_parameter(parameter, f"{prefix}{name}" if name else "", reduced=id(parameter) in managed)


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
