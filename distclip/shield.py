"""What surrounds a call and must not affect it: a default device, autocast, inference mode, torch.compile.

Private torch API, read in 2.13: ``DisableTorchFunction``, ``_is_any_autocast_enabled``, ``_dynamo.eval_frame`` and
the marks of ``torch.compiler.disable``, which itself would import all of Dynamo.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import DisableTorchFunction, _is_any_autocast_enabled
from torch._C._dynamo import eval_frame

NOT_TRACED = "distclip reads addresses and communicates, which cannot be compiled: call it outside, or "
P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, at which torch.compile breaks the graph, once, and compiles nothing inside; 0.3 us a call.

    With ``fullgraph=True`` it is an error.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler = eval_frame.set_eval_frame(None)  # it would compile what is called from here, frame by frame
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(compiler)

    marked: Any = call
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = f"{NOT_TRACED}leave out fullgraph=True"
    marked._torchdynamo_disable_recursive = True
    if hasattr(eval_frame, "set_code_exec_strategy"):  # not in torch 2.6, which tries this frame after the break
        skip, usual = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(marked.__code__, eval_frame._FrameExecStrategy(skip, usual))
    return call


def shielded(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, untraced, as if nothing surrounded it: no autograd, and new tensors are on the CPU; 2 us a call.

    Inside, these have no effect: ``torch.device("meta")``, ``torch.set_default_device`` and all other modes of
    ``__torch_function__``; ``torch.autocast``, which rounds and refuses dtypes; ``torch.inference_mode``, whose tensors
    cannot be changed outside it.
    """

    @untraced
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with DisableTorchFunction(), torch.no_grad():
            if not (torch.is_inference_mode_enabled() or _is_any_autocast_enabled()):
                return function(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad(), _no_autocast():
                return function(*args, **kwargs)

    return call


@contextmanager
def _no_autocast() -> Iterator[None]:
    accelerator = torch._C._get_accelerator().type  # the CPU's where there is none
    with ExitStack() as stack:
        for kind in {"cpu", accelerator}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
