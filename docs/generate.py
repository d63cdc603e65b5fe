"""The tables of reference/config.md and reference/cli.md, from the code: `python docs/generate.py` writes them.

A config key has its type and default from its field, and is described by the `#:` comment at or above it.
"""

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from distclip.cli import parser_of_commands
from distclip.train.config import ClipOptions, Config
from distclip.train.parse import plain, spelled
from distclip.train.policies import CATALOGUE, KINDS, NONE
from distclip.train.tasks.registry import TASKS

REFERENCE = Path(__file__).parent / "reference"
MARK = "<!-- from here on written by docs/generate.py -->\n"
COMMENTED = re.compile(r"((?:^    #: .*\n)*)^    (\w+): (?:.*?#: (.*)|.*)$", re.MULTILINE)
NESTED = {
    "policy": "[Its fields](#fields-of-policies) stand beside it",
    "chain": "a list of policies, one after the other",
    "per_parameter": "a policy for each parameter's own norm",
    "per_group": "groups by name, each with `patterns` of parameters and a policy",
    "shadow": "a policy that is `acting`, and others by name that are reported in `metrics.jsonl`",
}


def comments(section: type) -> dict[str, str]:
    """What the ``#:`` comments of a dataclass say of its fields."""
    found = COMMENTED.findall(inspect.getsource(section))
    return {name: " ".join([*re.findall(r"#: (.*)", above), beside]).strip() for above, name, beside in found}


def in_yaml(value: Any) -> str:
    """A default as a config has it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(plain(value)).replace("'", "")


def default(field: Field[Any]) -> str:
    return "" if field.default is MISSING else in_yaml(field.default)


def kind(type_: Any) -> str:
    return " or ".join(f"`{each}`" for each in get_args(type_)) if get_origin(type_) is Literal else spelled(type_)


def rows(section: type, prefix: str = "") -> Iterator[str]:
    said = comments(section)
    for field in fields(section):
        if not is_dataclass(field.type) and field.name not in ("data", "model"):
            yield f"| `{prefix}{field.name}` | {kind(field.type)} | {default(field)} | {said[field.name]} |"


def policy_rows() -> Iterator[str]:
    names = ", ".join(f"`{name}`" for name in sorted(CATALOGUE))
    yield f"| `clip.policy` | {names}, or `{NONE}`, which only measures | max_norm | {NESTED['policy']} |"
    yield from (f"| `clip.{name}` | | | {NESTED[name]} |" for name in KINDS if name != "policy")


def table(title: str, lines: Iterator[str]) -> str:
    return "\n".join([f"## {title}\n", "| key | type | default | |", "|---|---|---|---|", *lines]) + "\n"


def fields_of_policies() -> str:
    lines = ["## Fields of policies\n", "| `clip.policy` | fields and their defaults |", "|---|---|"]
    for name, policy in sorted(CATALOGUE.items()):
        has = ", ".join(f"`{f.name}`" + (f" {default(f)}" if default(f) else "") for f in fields(policy))
        lines.append(f"| `{name}` | {has} |")
    return "\n".join(lines) + "\n"


def config() -> str:
    parts = [table("The run", rows(Config))]
    for field in fields(Config):
        if field.name == "clip":
            parts += [table("clip", iter([*policy_rows(), *rows(ClipOptions, "clip.")])), fields_of_policies()]
        elif is_dataclass(field.type):
            parts.append(table(field.name, rows(field.type, f"{field.name}.")))
    for name, task in TASKS.items():
        both = [*rows(task.data, "data."), *rows(task.model, "model.")]
        parts.append(table(f"data and model of task: {name}", iter(both)))
    return "\n".join(parts)


def argument(action: argparse.Action) -> str:
    named = ", ".join(action.option_strings) or str(action.metavar)
    takes = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
    shown = f"{named} {takes}" if action.option_strings and takes else named
    return f"| `{shown}` | {action.help} |"


def command(name: str, parser: argparse.ArgumentParser) -> str:
    listed = [argument(each) for each in parser._actions if each.dest != "help"]
    lines = [f"## distclip {name}\n", f"{parser.description}\n", "| argument | |", "|---|---|", *listed]
    return "\n".join([*lines, "", "```text", (parser.epilog or "").strip(), "```"]) + "\n"


def cli() -> str:
    subparsers = next(each for each in parser_of_commands()._actions if isinstance(each.choices, dict))
    return "\n".join(command(name, parser) for name, parser in subparsers.choices.items())


def pages() -> dict[Path, str]:
    """Each page as it should be: what stands above the mark, and what the code says now."""
    made = {REFERENCE / "config.md": config(), REFERENCE / "cli.md": cli()}
    return {
        page: page.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n" + text for page, text in made.items()
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
