"""The arguments of `distclip doctor` and `distclip inspect`."""

import argparse
from pathlib import Path
from typing import Any

DOCTOR = """\
examples:
  distclip doctor
  torchrun --nproc-per-node 8 -m distclip doctor
  torchrun --nproc-per-node 8 -m distclip doctor --model mine:build --json doctor.json

exit codes:
  0    all is well
  1    something is wrong: the line of the check says what, and on which rank
  2    something on the command line is wrong: one line on stderr
  130  stopped by Ctrl-C
"""
INSPECT = """\
examples:
  distclip inspect --model mine:build
  torchrun --nproc-per-node 8 -m distclip inspect --model mine:build --all

exit codes as those of distclip doctor.
"""
BUILD = """
--model names a function without arguments, such as build in mine.py. It is called on every rank, once
torch.distributed is initialised, and returns the wrapped model, or a tuple with any of these:
  the model or its parts   modules, or a distclip.Clipper of them (for split_over=, layout=, a policy)
  optimizers               to see whether they apply the coefficient themselves (fused ones do)
  backward                 a function without arguments that runs a real forward and backward

docs/howto/doctor.md has an example.
"""


def add_doctor(commands: "argparse._SubParsersAction[Any]") -> None:
    about = "check that the norm is right on these ranks: versions, backend, layouts, your model"
    doctor = commands.add_parser("doctor", help=about, description=about, epilog=DOCTOR + BUILD)
    add_ranks(doctor, processes=2)
    doctor.add_argument("--model", metavar="MODULE:FUNCTION", help="verify your own model as well")
    doctor.add_argument(
        "--parameters", type=int, default=4_000_000, metavar="N", help="parameters of the model that is timed (4000000)"
    )


def add_inspect(commands: "argparse._SubParsersAction[Any]") -> None:
    about = "show what a Clipper does with a model: placements, replicas, what a step communicates"
    inspect = commands.add_parser("inspect", help=about, description=about, epilog=INSPECT + BUILD)
    add_ranks(inspect, processes=1)
    inspect.add_argument("--model", metavar="MODULE:FUNCTION", required=True, help="the function that builds it")
    inspect.add_argument("--all", action="store_true", dest="every", help="list every parameter")


def add_ranks(command: argparse.ArgumentParser, processes: int) -> None:
    """The options of commands whose ranks meet in the job's store."""
    command.add_argument(
        "--processes", type=int, default=processes, metavar="N", help=f"local ranks without a launcher ({processes})"
    )
    command.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: GPUs if there is one for each rank, else the CPU",
    )
    command.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="how long ranks wait for each other (30)"
    )
    command.add_argument("--json", type=Path, metavar="PATH", help="write the findings to this file; - for stdout")
