"""What to say where the library of a sink is not installed."""


def missing(package: str, extra: str) -> ImportError:
    return ImportError(f'{package} is not installed: pip install "distclip[{extra}]"')
