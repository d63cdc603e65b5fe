"""The policy that a config describes, from plain values to the dataclasses of the catalogue, and back."""

import math
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from distclip import Chain, Cosine, MaxNorm, PerGroup, PerParameter, Policy, Shadow, ValueClip, Warmup, policies
from distclip.train.problem import ConfigError, check_names, require

WRAPPERS = ("chain", "per_parameter", "per_group", "shadow")
KINDS = ("policy", *WRAPPERS)
NONE = "none"  # measures the norm and scales nothing
MOST = 10**6  # of whole numbers: they are lengths of what is kept, and sorted, in every step
ABSENT = object()


def spelled(kind: type) -> str:
    """A class as a config names it: max_norm, zclip, adagc, and value for ValueClip."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z](?!lip$|C$))", "_", kind.__name__).lower()
    return "value" if kind is ValueClip else words


def _is_on_its_own(kind: Any) -> bool:
    found = isinstance(kind, type) and is_dataclass(kind) and callable(getattr(kind, "decide", None))
    return found and kind not in (Chain, PerParameter, PerGroup, Shadow)


CATALOGUE: dict[str, type] = {spelled(kind): kind for kind in vars(policies).values() if _is_on_its_own(kind)}
SCHEDULES: dict[str, type] = {spelled(kind): kind for kind in (Warmup, Cosine)}


# ---- from a config ------------------------------------------------------------------------------------------


def policy_of(said: Any, key: str, beside: Sequence[str] = ()) -> Policy:
    """The policy that ``said`` describes; ConfigError with a key below ``key`` where it describes none.

    A mapping of ``policy``, its name, and its fields; or of one of WRAPPERS and what is inside; or a number, which
    means ``max_norm``. ``beside``: other keys, which are read elsewhere.
    """
    if isinstance(said, (int, float)) and not isinstance(said, bool):
        said = {"max_norm": said}
    require(isinstance(said, dict), key, f"must be a number or a policy: {{policy: zclip}}, not {said!r}")
    kind, *others = [kind for kind in KINDS if said.get(kind) is not None] or ["policy"]
    if others:
        raise ConfigError(f"{key}.{others[0]}", f"does not go with {key}.{kind}: give one of them")
    rest = {name: value for name, value in said.items() if name not in (*KINDS, *beside)}
    if kind == "policy":
        return _on_its_own(said.get("policy", "max_norm"), rest, key, beside)
    check_names(f"{key}.", rest, [kind, *beside])
    build = {"chain": _chain, "per_parameter": _per_parameter, "per_group": _per_group, "shadow": _shadow}[kind]
    return build(said[kind], f"{key}.{kind}")


def allowed_with(said: Mapping[str, Any]) -> Collection[str]:
    """The keys of what ``said``, which may be wrong, chooses."""
    kind = CATALOGUE.get(str(said.get("policy", "max_norm")))
    return ["policy", *(field.name for field in fields(kind))] if kind is not None else ["policy"]


def _on_its_own(name: Any, given: Mapping[str, Any], key: str, beside: Sequence[str] = ()) -> Policy:
    if name == NONE:
        require(not given, f"{key}.{next(iter(given), '')}", f"{key}.policy={NONE} has no fields: leave it out")
        return MaxNorm(math.inf)
    known = isinstance(name, str) and name in CATALOGUE
    require(known, f"{key}.policy", f"must be one of {', '.join((*CATALOGUE, NONE))}, not {name!r}")
    check_names(f"{key}.", given, [*(field.name for field in fields(CATALOGUE[name])), *beside])
    policy: Policy = _built(CATALOGUE[name], given, key, f"{key}.policy={name}")
    for field in given:
        value = getattr(policy, field)
        most = not isinstance(value, int) or value <= MOST
        require(most, f"{key}.{field}", f"must be at most 1e6, not {value}: so many numbers are kept and looked at")
    return policy


def _built(kind: Any, given: Mapping[str, Any], key: str, who: str) -> Any:
    """An instance of a dataclass from plain values for its fields; null leaves one at its default."""
    known = {field.name: field for field in fields(kind)}
    check_names(f"{key}.", given, list(known))
    given, hints = {name: value for name, value in given.items() if value is not None}, get_type_hints(kind)
    for name, field in known.items():
        missing = name not in given and _has_no_default(field)
        require(not missing, f"{key}.{name}", f"{who} needs it: add {key}.{name}={_example(hints[name])}")
    values = {name: _converted(value, hints[name], f"{key}.{name}") for name, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        first, _, reason = str(error).partition(" ")
        raise (ConfigError(f"{key}.{first}", reason) if first in known else ConfigError(key, str(error))) from None


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _example(hint: Any) -> str:
    return "1.0" if float in _parts(hint) else "..."


def _chain(inside: Any, key: str) -> Policy:
    require(isinstance(inside, list) and inside != [], key, f"must be a list of policies, not {inside!r}")
    return _composed(lambda: Chain(*(policy_of(each, f"{key}[{k}]") for k, each in enumerate(inside))), key)


def _per_parameter(inside: Any, key: str) -> Policy:
    return _composed(lambda: PerParameter(policy_of(inside, key)), key)


def _per_group(inside: Any, key: str) -> Policy:
    require(isinstance(inside, dict) and inside != {}, key, f"must be groups by name, not {inside!r}")
    groups: dict[str, Any] = {}
    for name, said in inside.items():
        there = isinstance(said, dict) and said.get("patterns") is not None
        require(there, f"{key}.{name}", f"must have patterns of parameters and a policy, not {said!r}")
        patterns = _converted(said["patterns"], str | Sequence[str], f"{key}.{name}.patterns")
        rest = {field: value for field, value in said.items() if field != "patterns"}
        alone = rest.get("policy") == NONE  # not even measured by a policy of its own
        groups[name] = patterns, None if alone and len(rest) == 1 else policy_of(rest, f"{key}.{name}")
    return _composed(lambda: PerGroup(groups), key)


def _shadow(inside: Any, key: str) -> Policy:
    named = isinstance(inside, dict) and "acting" in inside and all(isinstance(name, str) for name in inside)
    require(named, key, f"must be policies by names, one of them acting, not {inside!r}")
    found = {name: policy_of(said, f"{key}.{name}") for name, said in inside.items()}
    acting = found.pop("acting")
    return _composed(lambda: Shadow(acting, **found), key)


def _composed(build: Callable[[], Policy], key: str) -> Policy:
    try:
        return build()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(key, str(error)) from None


# ---- values of fields ---------------------------------------------------------------------------------------


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _converted(value: Any, hint: Any, key: str) -> Any:
    """``value`` as a field of this type has it; ConfigError for what it cannot be."""
    for part in _parts(hint):
        found = _as(value, part, key)
        if found is not ABSENT:
            return found
    raise ConfigError(key, f"must be {' or '.join(dict.fromkeys(map(_in_words, _parts(hint))))}, not {value!r}")


def _as(value: Any, kind: Any, key: str) -> Any:
    origin, number = get_origin(kind), isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and isinstance(value, int):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if origin is Literal and value in get_args(kind):
        return value
    if origin in (tuple, list, Sequence) and isinstance(value, list):
        return tuple(_converted(each, _item(kind, k), key) for k, each in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: _converted(each, get_args(kind)[1], f"{key}.{name}") for name, each in value.items()}
    if origin is Callable and isinstance(value, dict):
        return _schedule(value, key)
    return ABSENT


def _item(kind: Any, place: int) -> Any:
    """The type of this item of a sequence."""
    kinds = [each for each in get_args(kind) if each is not ...]
    return kinds[min(place, len(kinds) - 1)]


def _schedule(value: Mapping[str, Any], key: str) -> Any:
    name = next(iter(value), "")
    known = len(value) == 1 and name in SCHEDULES and isinstance(value[name], dict)
    require(
        known, key, f"must be a schedule: {{warmup: {{start: 10.0, end: 1.0, steps: 100}}}} or cosine, not {value!r}"
    )
    return _built(SCHEDULES[name], value[name], f"{key}.{name}", f"{key}.{name}")


def _in_words(kind: Any) -> str:
    origin, inside = get_origin(kind), [each for each in get_args(kind) if each is not ...]
    if origin is Callable:
        return f"a schedule ({', '.join(SCHEDULES)})"
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin in (tuple, list, Sequence):
        return f"a list of {' and '.join(dict.fromkeys(map(_in_words, inside)))}"
    if origin is Mapping:
        return f"{_in_words(inside[1])} by names"
    return "null" if kind is types.NoneType else str(getattr(kind, "__name__", kind))


# ---- back ---------------------------------------------------------------------------------------------------


def plain(policy: Policy) -> dict[str, Any]:
    """What :func:`policy_of` reads as ``policy``, with all its fields."""
    match policy:
        case Chain():
            return {"chain": [plain(each) for each in policy.policies]}
        case PerParameter():
            return {"per_parameter": plain(policy.policy)}
        case PerGroup():
            pairs = policy.groups.items()
            left_alone = {"policy": NONE}
            groups = {n: {"patterns": list(p), **(plain(each) if each else left_alone)} for n, (p, each) in pairs}
            return {"per_group": groups}
        case Shadow():
            return {"shadow": {name: plain(each) for name, each in policy.inner.items()}}
    own = {field.name: _plain_value(getattr(policy, field.name)) for field in fields(policy)}  # type: ignore[arg-type]
    return {"policy": spelled(type(policy)), **own}


def _plain_value(value: Any) -> Any:
    if type(value) in SCHEDULES.values():
        return {spelled(type(value)): {field.name: getattr(value, field.name) for field in fields(value)}}
    if isinstance(value, Mapping):
        return {name: _plain_value(each) for name, each in value.items()}
    return [_plain_value(each) for each in value] if isinstance(value, (tuple, list)) else value
