"""What the command prints when it refuses or fails: one line on stderr."""

import sys

LONGEST = 500  # characters; a value from a config or a path can be a million


def complain(text: str) -> None:
    """Print what is wrong, without control characters."""
    print(f"distclip: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """``text`` with line breaks and control characters escaped, and its middle left out if it is too long."""
    spelled = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 4 * LONGEST])
    if len(text) <= LONGEST and len(spelled) <= LONGEST:
        return spelled
    return f"{spelled[: LONGEST - 5]} ..."
