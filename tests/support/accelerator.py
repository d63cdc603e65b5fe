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

The rules are CUDA's where the CPU's are others; docs/explanation/cuda.md lists them, each with its place in torch's
source.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any
from weakref import WeakValueDictionary

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
READS = (  # whose result, or its size, the host has to know
    *("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero"),
    *("aten::masked_select", "aten::_unique2", "aten::repeat_interleave.Tensor", "aten::bincount"),
)
# What takes one number of the host as an argument of its kernel; nothing else does but what fills a tensor with it.
BINARY = {
    *("add", "sub", "rsub", "mul", "div", "remainder", "fmod", "pow", "atan2", "hypot", "copysign"),
    *("eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "fmax", "fmin"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor"),
}
FILLING = {"fill", "masked_fill"}
SUMMING = {"linalg_vector_norm", "sum"}
VIEWS = {
    *("view", "alias", "detach", "select", "slice", "unbind", "split", "expand", "permute", "transpose", "t"),
    *(
        "unsqueeze",
        "squeeze",
        "unfold",
        "as_strided",
        "_reshape_alias",
        "view_as_real",
        "view_as_complex",
        "set",
        "resize",
    ),
    *("empty", "empty_strided"),
}
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
    torch.ops.aten.logical_and.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
)
FOREACH = (  # one launch for a list of tensors, where CUDA takes its fast route; a launch a tensor elsewhere
    torch.ops.aten._foreach_norm.Scalar,
    torch.ops.aten._foreach_mul_.Tensor,
    torch.ops.aten._foreach_mul_.Scalar,
    torch.ops.aten._foreach_add_.Scalar,
    torch.ops.aten._foreach_sub_.List,
    torch.ops.aten._foreach_clamp_min_.Scalar,
    torch.ops.aten._foreach_clamp_max_.Scalar,
    torch.ops.aten._foreach_copy_.default,
    torch.ops.aten._foreach_zero_.default,
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
    launches: list[str] = field(default_factory=list)  # of kernels on one tensor
    largest: int = 0  # bytes of the largest tensor that was made
    current: int = 0  # index of the device that is current; tensors lie on 0
    arriving: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by device: what its stream copies

    def wait(self, what: str) -> None:
        self.waits += 1
        if self.forbidden or self.graph is not None:
            raise Wait(what)


_all_reduce, _all_to_all = dist.all_reduce, dist.all_to_all_single
_device = _Device()
_libraries: list[Any] = []  # what they define ends with them
_pinned: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by id
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
    name, base = op.name(), op.name().removeprefix("aten::").partition(".")[0].removesuffix("_")
    if name in READS or (name.startswith("aten::masked_fill") and is_here(args[2])):  # its value is an item
        _device.wait(name)
    if base not in VIEWS and not base.startswith(("_foreach", "_fused", "_amp")):
        _device.launches.append(name)
    if name == "aten::_copy_from":
        return _copied(*args)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _refuse_the_host(name, base, [tensor for tensor in given if not is_here(tensor)])
    if name == "aten::as_strided":
        assert args[0].stride() == raw(args[0]).stride(), "views of views with gaps are not simulated"
    shells = {id(raw(tensor)): tensor for tensor in given if is_here(tensor)}
    if base in BINARY:
        args = _at_their_precision(*args)
    if base in SUMMING and args[0].dtype != kwargs["out"].dtype:  # the whole of it is converted first
        _device.largest = max(_device.largest, args[0].numel() * kwargs["out"].element_size())
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
        if id(found) in shells:
            return shells[id(found)]
        _device.largest = max(_device.largest, 0 if base in VIEWS - {"empty", "empty_strided"} else found.nbytes)
        return wrapped(found)

    return tree_map(shell, _record(op, args, kwargs))


def _copied(source: Tensor, target: Tensor, *non_blocking: bool) -> Tensor:
    """A copy, waited for between host and device unless it is ``non_blocking``; what goes to the host arrives later."""
    between, waits = is_here(source) != is_here(target), not any(non_blocking)
    if between and (_device.graph is not None or waits):
        _device.wait(f"a copy between host and device, of shape {tuple(source.shape)}")
    if between and not waits and is_here(source):
        if id(target) not in _pinned:
            _device.wait("a copy to memory of the host that is not pinned")
        _device.arriving.setdefault(source.device.index, []).append((target, raw(source).clone()))
        return target
    _record(torch.ops.aten.copy_.default, (raw(target), raw(source)), {})
    return target


def _refuse_the_host(name: str, base: str, hosts: list[Tensor]) -> None:
    """What CUDA does with tensors of the host among those of the device: one number travels with some kernels."""
    if not hosts:
        return
    numbers = not any(tensor.ndim for tensor in hosts)
    if name.startswith("aten::index"):
        _device.wait(f"{name} with indices of the host")
    elif base == "where" and numbers:
        _device.wait("where copies a number of the host to the device")
    elif not numbers or len(hosts) > 1 or not (base in BINARY or base in FILLING or base.startswith("_foreach")):
        raise RuntimeError(f"{name} of tensors of the host and of the device, which no GPU does")


def _at_their_precision(left: Any, right: Any, *more: Any) -> tuple[Any, ...]:
    """The operands with 0-d ones of the device cast to the common dtype; a number of the host keeps its own."""
    if not (is_here(left) and is_here(right)) or left.dtype == right.dtype:
        return left, right, *more
    common, to = torch.result_type(raw(left), raw(right)), torch.ops.aten._to_copy.default
    cast = [x if x.ndim or x.dtype == common else _record(to, (raw(x),), {"dtype": common}) for x in (left, right)]
    return *cast, *more


def _foreach(op: Callable[..., Any], tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    """A kernel for many tensors, where CUDA has one; elsewhere one for each of them, with the rules of that."""
    name = op.name().removeprefix("aten::_foreach_").partition(".")[0]
    if _is_fast(name, tensors, args):
        return _run(op, tensors, *args, **kwargs)
    if name == "norm":
        p, dtype = (*args, None)[:2]
        return [torch.linalg.vector_norm(t, p, dtype=dtype) for t in tensors]
    for k, tensor in enumerate(tensors):
        getattr(tensor, name)(*(arg[k] if isinstance(arg, list) else arg for arg in args))
    return None


def _is_fast(name: str, tensors: list[Tensor], args: tuple[Any, ...]) -> bool:
    """Whether CUDA takes its fast route: one dtype, dense in memory, and what each operation asks for beside."""
    if any(not _is_dense(raw(t)) for t in tensors) or len({t.dtype for t in tensors}) > 1:
        return False
    dtype, other = tensors[0].dtype, args[0] if args else None
    if name == "norm":
        return other in (1, 2, inf) and not dtype.is_complex
    if isinstance(other, Tensor):
        return not is_here(other) or other.dtype == dtype
    if isinstance(other, list):
        return (
            (name == "copy_" or {t.dtype for t in other} == {dtype})
            and len({t.dtype for t in other}) == 1
            and all(
                a.shape == b.shape and raw(a).stride() == raw(b).stride() for a, b in zip(tensors, other, strict=True)
            )
        )
    return not (isinstance(other, complex) and not dtype.is_complex)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).is_contiguous()


def _unscale(tensors: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """The kernel of GradScaler, which CUDA has not for all dtypes."""
    for dtype in {t.dtype for t in tensors} - {torch.float32, torch.float64, torch.float16}:
        raise NotImplementedError(f'"_amp_foreach_non_finite_check_and_unscale_cuda" not implemented for {dtype}')
    _run(torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default, tensors, found_inf, inv_scale)


def _record(op: Any, args: Any, kwargs: Any) -> Any:
    found = op(*args, **kwargs)
    if _device.graph is not None:
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        _device.graph.calls.append((op, args, kwargs, outputs))
    return found


def all_reduce(words: Tensor, op: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None) -> None:
    """Takes the place of ``torch.distributed.all_reduce``, whose groups have no backend for the device."""
    _record(lambda words: _all_reduce(words, op, group=group), (raw(words),), {})


def all_to_all(received: Tensor, sent: Tensor, *splits: list[int], group: dist.ProcessGroup | None = None) -> None:
    """Takes the place of ``torch.distributed.all_to_all_single``, as :func:`all_reduce` does."""
    _all_to_all(raw(received), raw(sent), *splits, group=group)


def use_accelerator() -> None:
    """Let torch know the device, for good."""
    if _libraries:
        return
    _set_up(DEVICE)
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    for op in OURS:
        aten.impl(op.name(), partial(_run, op), "PrivateUse1")
    for op in FOREACH:
        aten.impl(op.name(), partial(_foreach, op), "PrivateUse1")
    aten.impl("_amp_foreach_non_finite_check_and_unscale_", _unscale, "PrivateUse1")
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
def counted_launches() -> Iterator[list[str]]:
    """The kernels launched inside on one tensor each, when it is over: neither foreach kernels nor fused optimizers."""
    launches: list[str] = []
    before = len(_device.launches)
    yield launches
    launches += _device.launches[before:]


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Bytes of the largest tensor made inside, copies that kernels make included, when it is over."""
    sizes: list[int] = []
    _device.largest = 0
    yield sizes
    sizes.append(_device.largest)


@contextmanager
def current_device(index: int) -> Iterator[None]:
    """Inside, the device of this index is current, which changes nothing of where tensors lie."""
    before, _device.current = _device.current, index
    try:
        yield
    finally:
        _device.current = before


class Event:
    """Takes the place of ``torch.Event``: recorded on the stream that is current on the *current* device if on none."""

    def __init__(self, device: Any = None) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: torch.Stream | None = None) -> None:
        index = _device.current if stream is None else stream.device_index
        self._copies = _device.arriving.pop(index, [])

    def synchronize(self) -> None:
        """Wait for what was queued before: copies to the host have arrived then, and not sooner."""
        for host, numbers in self._copies:
            host.copy_(numbers)


def pinned_like(words: Tensor) -> Tensor:
    """Takes the place of ``distclip.kernels.transfer.pinned_like``: host memory in which nothing has arrived yet."""
    host = torch.zeros(words.shape, dtype=words.dtype)
    _pinned[id(host)] = host
    return host


@contextmanager
def capture() -> Iterator[Graph]:
    """Record what the device does inside."""
    _device.graph = graph = Graph()
    try:
        yield graph
    finally:
        _device.graph = None


def capturing(device: torch.device) -> bool:
    """Takes the place of ``distclip.kernels.device.in_capture``."""
    return _device.graph is not None
