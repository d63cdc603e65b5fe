"""The pictures of documents: `python -m reporting.shoot PAGE PICTURE [--dark] [--width N] [--height N]`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from reporting.browser import Browser

SETTLED = "new Promise(done => setTimeout(done, 500))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1120)
    parser.add_argument("--height", type=int, default=1180, help="0: all of it")
    words = parser.parse_args()
    with TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        browser.open(words.page, width=words.width, height=words.height or 900, dark=words.dark)
        browser.ask(SETTLED)
        browser.picture(words.picture, whole=not words.height)
        assert browser.problems == [], browser.problems


if __name__ == "__main__":
    main()
