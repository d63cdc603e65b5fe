"""What doctor and inspect say where something is wrong: what, on which rank, and what to do about it."""

from collections.abc import Sequence
from pathlib import Path

from distclip.errors import and_more


def ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {and_more(numbers, 8)}"


def absent(numbers: Sequence[int], seconds: float) -> str:
    verb = "do" if len(numbers) > 1 else "does"
    return f"{ranks(numbers)} {verb} not answer within {seconds:.0f} s: dead or stuck, see what was printed there"


def other_versions(what: str, odd: Sequence[int], theirs: str, usual: str) -> str:
    return f"{ranks(odd)}: {what} {theirs}, the others have {usual}: install the same on every machine"


def bad_processes(processes: int, most: int) -> str:
    return f"--processes must be from 1 to {most}, not {processes}"


def bad_timeout(seconds: float) -> str:
    return f"--timeout must be above 0 seconds, not {seconds:g}"


def bad_parameters(parameters: int) -> str:
    return f"--parameters must be at least 1, not {parameters}"


def no_gpus(processes: int, gpus: int) -> str:
    return f"--device cuda: {processes} processes need as many GPUs, this machine has {gpus}"


def not_writable(path: Path) -> str:
    return f"--json: {path} cannot be written"


def killed(rank: int, name: str) -> str:
    return f"rank {rank} was killed by {name}"


def not_met(rank: int, error: RuntimeError) -> str:
    return f"rank {rank} cannot reach the store where ranks meet: {str(error).splitlines()[0]}"


def bad_path(name: str) -> str:
    return f"--model: {name!r} is not of the form package.module:function"


def not_imported(module: str, error: BaseException) -> str:
    return f"--model: {module} cannot be imported ({type(error).__name__}: {error})"


def no_such_name(module: str, name: str) -> str:
    return f"--model: {module} has no {name}"


def no_function(name: str, got: object) -> str:
    return f"--model: {name} is {type(got).__name__}, not a function that builds the model"


def not_called(name: str, error: BaseException, where: str) -> str:
    return f"{name} of --model raised {type(error).__name__}: {error}{where}"


def no_model(name: str, got: object) -> str:
    return (
        f"--model: {name}() returned {type(got).__name__}, not a module: return the wrapped module, or a tuple of "
        "modules (or a Clipper), optimizers and a function backward()"
    )
