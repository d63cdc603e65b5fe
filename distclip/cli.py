"""The command line: `distclip train CONFIG [key=value ...]`."""

import argparse
import sys
from collections.abc import Sequence

from distclip import __version__

# modules of the extra `train`, under the names to install them by
EXTRA = {"jsonargparse": "jsonargparse", "rich": "rich", "sklearn": "scikit-learn", "yaml": "PyYAML"}
EPILOG = """\
examples:
  distclip train configs/quickstart.yaml
  distclip train configs/quickstart.yaml train.steps=50 clip.max_norm=0.5
  distclip train configs/quickstart.yaml run.dir=runs/mine resume=true
  torchrun --nproc-per-node 2 -m distclip train configs/quickstart.yaml

Without a launcher, `parallel.processes` of the config says how many local processes are started.
docs/train.md lists every key.

exit codes:
  0    finished
  1    failed in training
  2    something in the config, on the command line or in the data is wrong: one line on stderr
  130  stopped by Ctrl-C (143: by SIGTERM, 129: by SIGHUP), with a checkpoint to go on from
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    config, overrides = parse(words)
    try:
        from distclip.train.start import start  # needs the extra; --help and --version do not

        return start(config, overrides)
    except ModuleNotFoundError as error:
        package = EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f'distclip: training needs {package}: pip install "distclip[train]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(words: list[str]) -> tuple[str, list[str]]:
    """The config's path and the `key=value` words; `--key=value` is the same."""
    parser = argparse.ArgumentParser(
        prog="distclip",
        description="Train with gradients clipped by the true global norm.",
    )
    parser.add_argument("--version", action="version", version=f"distclip {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train as a YAML file says, on the ranks it asks for or under torchrun",
        description="Train as a YAML file says, on the ranks it asks for or under torchrun.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the file's")
    known, others = parser.parse_known_args(words)
    return known.config, [*known.overrides, *others]
