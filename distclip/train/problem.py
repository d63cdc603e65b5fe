"""What the user can fix: a config key and what is wrong with it, in one line."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class ConfigError(ValueError):
    """A value in the config, on the command line or in the data cannot be used."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


def require(condition: bool, key: str, reason: str) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(key, reason)


def check_names(prefix: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Raise a `ConfigError` for a key that is not known, with the nearest that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}", f"there is no such key; {hint}")


def located(path: Path) -> str:
    """A path as messages name it: a relative one is of the folder in which the command runs."""
    return str(path) if path.is_absolute() else f"{path} (in {Path.cwd()})"
