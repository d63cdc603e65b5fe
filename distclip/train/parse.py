"""From a YAML file and `key=value` overrides to a checked `Config`, and back to YAML."""

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jsonargparse
import yaml

from distclip.train.config import Clip, ClipOptions, Config
from distclip.train.document import LARGEST, DocumentError, PlainDumper, parse
from distclip.train.policies import KINDS, allowed_with, plain as plain_policy, policy_of
from distclip.train.problem import ConfigError, check_names, require
from distclip.train.tasks.registry import TASKS

ABSENT = object()
VERBATIM = "verbatim"  # a mode of jsonargparse in which text stays text, instead of being read as YAML again
jsonargparse.set_loader(VERBATIM, lambda text: text)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run that a YAML file with `key=value` overrides describes.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, missing, or has a wrong type or value.
    """
    document = read_yaml(Path(path))
    in_file = dict(document["clip"]) if isinstance(document.get("clip"), dict) else {}
    for word in overrides:
        override(document, word)
    drop_policy(in_file, document, [word.removeprefix("--").partition("=")[0] for word in overrides])
    task = document.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError("task", f"must be one of {', '.join(TASKS)}, not {task!r}")
    return build(document, sections(task))


def to_yaml(config: Config) -> str:
    """The whole config, defaults included: reading it back gives an equal one."""
    return yaml.dump(plain(document_of(config)), Dumper=PlainDumper, sort_keys=False)


def document_of(config: Config) -> dict[str, Any]:
    """The values of a config as a file has them."""
    whole = replace(config, clip=config.clip.options)  # type: ignore[arg-type]  # a policy is no section
    return {**asdict(whole), "clip": {**plain_policy(config.clip.policy), **asdict(config.clip.options)}}


def plain(value: Any) -> Any:
    """Tuples as lists: YAML has no other sequence."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        require(not path.is_dir(), str(path), "is a folder: name a config in it, such as configs/quickstart.yaml")
        require(path.is_file(), str(path), "there is no such config file")
        with path.open("rb") as file:
            document = parse(file.read(LARGEST + 1))
    except DocumentError as error:
        raise ConfigError(str(path), str(error)) from error
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    require(isinstance(document, dict), str(path), "a config is a mapping of keys to values")
    return document  # type: ignore[no-any-return]


def override(document: dict[str, Any], word: str) -> None:
    """Put one `section.key=value` into the document; the value is parsed as YAML."""
    key, equals, text = word.removeprefix("--").partition("=")
    require(equals == "=", word, "give overrides as key=value, such as train.steps=50")
    *parents, last = key.split(".")
    place = document
    for name in parents:
        place = place.setdefault(name, {})
        require(isinstance(place, dict), key, f"{name} is a value, not a section")
    try:
        place[last] = parse(text)
    except DocumentError as error:
        raise ConfigError(key, f"cannot read the value {text!r}: {error}") from error


def drop_policy(in_file: dict[str, Any], document: dict[str, Any], given: Sequence[str]) -> None:
    """Where the command line chooses another policy, forget what the file says of the fields that it lacks."""
    chosen = [key.split(".")[1] for key in given if key.startswith("clip.")]
    kinds = [key for key in chosen if key in KINDS]
    if not kinds:
        return
    clip = document["clip"]
    fits_it = allowed_with(clip) if kinds == ["policy"] else kinds
    for name in in_file:
        if name not in (*chosen, *fits_it, *(field.name for field in fields(ClipOptions))):
            del clip[name]


def sections(task: str) -> dict[str, Any]:
    """The type of every top-level key; `task` determines those of `data` and `model`. The policy is read apart."""
    known = {field.name: field.type for field in fields(Config)} | {"clip": ClipOptions}
    return known | {"data": TASKS[task].data, "model": TASKS[task].model}


def build(document: dict[str, Any], known: dict[str, Any]) -> Config:
    """Let jsonargparse convert and check the types, and the dataclasses check the values."""
    document, clip = without_policy(document)
    types_of = {key: kind for section, type_ in known.items() for key, kind in flat(section, type_)}
    check_keys(document, known)
    for key, kind in types_of.items():
        value = at(document, key)
        require(value is ABSENT or fits(value, kind), key, f"must be {spelled(kind)}, not {value!r}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=VERBATIM)
    for field in fields(Config):
        default = None if field.default is MISSING else field.default
        parser.add_argument(f"--{field.name}", type=known[field.name], default=default)
    try:
        namespace = parser.instantiate(parser.parse_object(document))
    except jsonargparse.ArgumentError as error:
        raise wrong_type(error, document, types_of) from error
    policy = policy_of(clip, "clip", beside=[field.name for field in fields(ClipOptions)])
    return Config(**{**vars(namespace), "clip": Clip(policy=policy, options=namespace.clip)})


def without_policy(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document without what its section ``clip`` says of the policy, and that section."""
    clip, options = document.get("clip") or {}, [field.name for field in fields(ClipOptions)]
    require(isinstance(clip, dict), "clip", f"is a section of keys, not {clip!r}")
    return {**document, "clip": {name: value for name, value in clip.items() if name in options}}, clip


def at(document: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, or ABSENT."""
    *parents, last = key.split(".")
    for name in parents:
        document = document[name]
    return document.get(last, ABSENT)


def flat(prefix: str, type_: Any) -> Iterator[tuple[str, Any]]:
    """Every key under `prefix` with its type."""
    if is_dataclass(type_):
        for field in fields(type_):
            yield from flat(f"{prefix}.{field.name}", field.type)
    else:
        yield prefix, type_


def check_keys(document: dict[str, Any], known: dict[str, Any]) -> None:
    """Check that all keys exist, sections are mappings, and no required key is missing."""
    check_names("", document, list(known))
    for field in fields(Config):
        if not is_dataclass(known[field.name]):
            missing = document.get(field.name) is None and field.default is MISSING
            require(not missing, field.name, "is missing")
    for name, type_ in known.items():
        if is_dataclass(type_):
            section = document.setdefault(name, {})
            require(isinstance(section, dict), name, f"is a section of keys, not {section!r}")
            check_names(f"{name}.", section, [field.name for field in fields(type_)])
            for field in fields(type_):
                missing = section.get(field.name) is None and field.default is MISSING
                require(not missing, f"{name}.{field.name}", "is missing")


def fits(value: Any, kind: Any) -> bool:
    """Whether null, text and lists appear only where the type allows them, and mappings nowhere.

    jsonargparse checks the rest. It would accept null, parse text again as YAML, and take a mapping for a class to
    make.
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if isinstance(value, list):
        return get_origin(kind) is tuple and all(any(fits(v, part) for part in get_args(kind)) for v in value)
    if value is None:
        return kind is types.NoneType
    if isinstance(value, str):
        return kind is str or get_origin(kind) is Literal
    return not isinstance(value, dict)


def wrong_type(error: Exception, document: dict[str, Any], types_of: dict[str, Any]) -> ConfigError:
    """jsonargparse's several lines as one, in YAML's terms."""
    named = re.search(r'key "([\w.]+)"', str(error))
    if named is None or named[1] not in types_of:
        return ConfigError("config", " ".join(str(error).split()))
    return ConfigError(named[1], f"must be {spelled(types_of[named[1]])}, not {at(document, named[1])!r}")


def spelled(type_: Any) -> str:
    """A type in words: `int | None` is "int or null"."""
    if isinstance(type_, types.UnionType):
        return " or ".join(spelled(part) for part in get_args(type_))
    if type_ is types.NoneType:
        return "null"
    if get_origin(type_) is tuple:
        return "a list of " + " and ".join(dict.fromkeys(spelled(t) for t in get_args(type_) if t is not ...))
    if get_args(type_):  # a Literal
        return "one of " + ", ".join(get_args(type_))
    return str(type_.__name__)
