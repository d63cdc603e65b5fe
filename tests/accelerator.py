"""An accelerator that is not there: tensors that torch takes for a device's, computed on the CPU, and every wait known.

    use_accelerator()              # in a process of its own: torch knows of the device ever after
    x = torch.ones(3, device=DEVICE)
    with no_waits():
        y = x * 2                  # queued, as far as anybody can tell
        y.sum().item()             # raises Wait
    with capture() as graph:
        x += 1                     # done once, and again in each graph.replay(), on the same memory

It is torch's own backend for devices written in Python (2.13, ``torch.utils.backend_registration``): what has no kernel
for the device arrives here after autograd and after composite operations were taken apart, as a GPU's kernels would be
called. Shells of tensors say that these are contiguous.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _set_up
except ImportError:  # torch before 2.10 or so
    _set_up = None
DEVICE = "npu"
EXISTS = _set_up is not None
READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero")
OURS = (  # torch has one kernel for all devices, which asks the device for nothing, resizes, or reckons with strides
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.dtype,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.unbind.int,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.abs.default,
    torch.ops.aten.bitwise_not.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
)


class Wait(Exception):
    """The host waited for the device where it must not."""


class OnDevice(Tensor):
    """A tensor of the device, without numbers of its own: :func:`raw` has them."""

    __torch_function__ = torch._C._disabled_torch_function_impl


@dataclass
class Graph:
    """Operations on the memory that they had when they were captured."""

    calls: list[tuple[Any, Any, Any, list[Tensor]]] = field(default_factory=list)

    def replay(self) -> None:
        for op, args, kwargs, outputs in self.calls:
            found = [leaf for leaf in tree_leaves(op(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, new in zip(outputs, found, strict=True):
                if new.data_ptr() != output.data_ptr():  # not in place, nor a view
                    output.copy_(new)


@dataclass
class _Device:
    waits: int = 0
    forbidden: bool = False
    graph: Graph | None = None

    def wait(self, what: str) -> None:
        self.waits += 1
        if self.forbidden or self.graph is not None:
            raise Wait(what)


_all_reduce = dist.all_reduce
_device = _Device()
_libraries: list[Any] = []  # what they define ends with them
_numbers: dict[int, Tensor] = {}  # by the storage that a shell has, which autograd's copies of it share


def is_here(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == DEVICE


def raw(tensor: Any) -> Any:
    """The tensor on the CPU that holds the numbers of one on the device."""
    return _numbers[tensor.untyped_storage()._cdata] if is_here(tensor) else tensor


def wrapped(tensor: Tensor) -> Tensor:
    shell = torch._C._acc.create_empty_tensor(tuple(tensor.shape), tensor.dtype)
    shell.__class__ = OnDevice
    _numbers[shell.untyped_storage()._cdata] = tensor
    return shell


def _run(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An operation of the device, as the CPU does it."""
    name = op.name()
    if name in READS:
        _device.wait(name)
    if name == "aten::_copy_from":
        source, target, *non_blocking = args
        between = is_here(source) != is_here(target)
        if between and (_device.graph is not None or not any(non_blocking)):
            _device.wait(f"a copy between host and device, of shape {tuple(source.shape)}")
        assert not (between and is_here(source) and any(non_blocking)), "the host may read it before it has arrived"
        _record(torch.ops.aten.copy_.default, (raw(target), raw(source)), {})
        return target
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(not is_here(tensor) and tensor.ndim for tensor in given):  # 0-d ones travel as arguments
        if not name.startswith("aten::index"):
            raise RuntimeError(f"{name} of tensors of the host and of the device, which no GPU does")
        _device.wait(f"{name} with indices of the host")
    if name == "aten::as_strided":
        assert args[0].stride() == raw(args[0]).stride(), "views of views with gaps are not simulated"
    shells = {id(raw(tensor)): tensor for tensor in given if is_here(tensor)}
    args, kwargs = tree_map(raw, (args, kwargs))
    kinds = [str(argument.type) for argument in op._schema.arguments]
    args = tuple(
        torch.tensor(arg, dtype=torch.float64 if isinstance(arg, float) else None)
        if kind == "Tensor" and isinstance(arg, (int, float))
        else arg
        for kind, arg in zip(kinds, args, strict=False)  # Python is handed a number where C++ is handed a 0-d tensor
    )
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)

    def shell(found: Any) -> Any:
        if not isinstance(found, Tensor) or any(found is tensor for tensor in given):
            return found
        assert id(found) not in shells or found.shape == shells[id(found)].shape, f"{name} resizes: add it to OURS"
        return shells[id(found)] if id(found) in shells else wrapped(found)

    return tree_map(shell, _record(op, args, kwargs))


def _record(op: Any, args: Any, kwargs: Any) -> Any:
    found = op(*args, **kwargs)
    if _device.graph is not None:
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        _device.graph.calls.append((op, args, kwargs, outputs))
    return found


def all_reduce(words: Tensor, op: Any, group: dist.ProcessGroup | None = None) -> None:
    """Takes the place of ``torch.distributed.all_reduce``, whose groups have no backend for the device."""
    _record(lambda words: _all_reduce(words, op, group=group), (raw(words),), {})


def use_accelerator() -> None:
    """Let torch know the device, for good; once in a process."""
    _set_up(DEVICE)
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    for op in OURS:
        aten.impl(op.name(), partial(_run, op), "PrivateUse1")
    _libraries.extend([every, aten])


@contextmanager
def no_waits() -> Iterator[None]:
    """Inside, a wait raises."""
    _device.forbidden = True
    try:
        yield
    finally:
        _device.forbidden = False


@contextmanager
def counted_waits() -> Iterator[list[int]]:
    """How often the host waited inside, when it is over."""
    counts: list[int] = []
    before = _device.waits
    yield counts
    counts.append(_device.waits - before)


@contextmanager
def capture() -> Iterator[Graph]:
    """Record what the device does inside."""
    _device.graph = graph = Graph()
    try:
        yield graph
    finally:
        _device.graph = None


def capturing(device: torch.device) -> bool:
    """Takes the place of ``distclip.flags.in_capture``."""
    return _device.graph is not None
