"""What the user can fix: a config key and what is wrong with it, in one line."""


class ConfigError(ValueError):
    """A value in the config, on the command line or in the data cannot be used."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


def require(condition: bool, key: str, reason: str) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(key, reason)
