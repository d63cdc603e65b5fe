"""The Clipper that a config asks for."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from distclip import PerGroup, Policy, Signal, Statistic, ValueClip
from distclip.errors import and_more
from distclip.policies.trust import inner_of
from distclip.step.options import Options, Watch
from distclip.train.config import Clip, Config
from distclip.train.problem import require

SIGNALS = ("loss",)  # what the trainer passes to policies that ask for it


def options_of(clip: Clip) -> Options:
    return {
        "nonfinite": clip.options.nonfinite,
        "max_consecutive_skips": clip.options.max_consecutive_skips,
        "watch": watch_of(clip),
        "watch_zeros": clip.options.watch_zeros,
        "exact": clip.options.exact,
        "fingerprint_every": clip.options.fingerprint_every,
        "verify_every": clip.options.verify_every,
        "on_drift": None if clip.options.on_drift == "auto" else clip.options.on_drift,
    }


def watch_of(clip: Clip) -> Watch | None:
    return {each: each for each in patterns_of(clip)} or ("parameters" if clip.options.watch else None)


def patterns_of(clip: Clip) -> tuple[str, ...]:
    """What is watched by pattern: each has a column of its name."""
    return clip.options.watch if isinstance(clip.options.watch, tuple) else ()


def signals_of(clip: Clip) -> tuple[str, ...]:
    """Which numbers of the trainer the policy asks for."""
    return tuple(dict.fromkeys(each.name for each in clip.policy.needs() if isinstance(each, Signal)))


def scales(clip: Clip) -> bool:
    """Whether the policy has a coefficient."""
    return not isinstance(clip.policy, ValueClip)


def check_clip(config: Config, names: Sequence[str]) -> None:
    """Check that patterns are of some of these parameters of the whole model, and that signals can be passed."""
    clip = config.clip
    for pattern in patterns_of(clip):
        check_some([pattern], names, "clip.watch")
    for policy in all_in(clip.policy):
        if isinstance(policy, PerGroup):
            check_groups(policy, names)
    zero = config.parallel.strategy.startswith("zero")
    require(not (zero and clip.options.find_source), "clip.find_source", "does not go with DeepSpeed: set it to false")
    require(not (zero and clip.options.exact), "clip.exact", "does not go with DeepSpeed: set it to false")
    for name in ("fingerprint_every", "verify_every"):
        given = getattr(clip.options, name) is not None
        require(not (zero and given), f"clip.{name}", "does not go with DeepSpeed: leave it out")
    alone = clip.options.watch is None and all(each == Statistic() for each in clip.policy.needs())
    require(alone or not clip.options.exact, "clip.exact", "measures one norm, of all parameters: set it to false")
    for name in signals_of(clip):
        require(name in SIGNALS, "clip", f"the policy asks for the signal {name}: the trainer has {', '.join(SIGNALS)}")
        require(
            not zero, "clip", f"the policy asks for the signal {name}, which DeepSpeed does not pass: use fsdp2 or ddp"
        )


def all_in(policy: Policy) -> Iterator[Policy]:
    """A policy and all that are inside it."""
    yield policy
    for inner in inner_of(policy).values():
        yield from all_in(inner)


def check_groups(policy: PerGroup, names: Sequence[str]) -> None:
    """Check that each group has parameters, and no other group has them too."""
    owners: dict[str, str] = {}
    for group, (patterns, _) in policy.groups.items():
        for name in check_some(patterns, names, f"clip.per_group.{group}.patterns"):
            other = owners.setdefault(name, group)
            require(other == group, f"clip.per_group.{group}.patterns", f"{name} is in the group {other} already")


def check_some(patterns: Sequence[str], names: Sequence[str], key: str) -> list[str]:
    """The names that one of the patterns matches."""
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    shown = " or ".join(map(repr, patterns))
    require(found != [], key, f"no parameter matches {shown}: choose among {and_more(names)}")
    return found
