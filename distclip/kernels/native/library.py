"""Where the compiled library lies. hatch_build.py runs this file too, so it imports nothing of distclip."""

import re
import sysconfig
from hashlib import blake2b
from pathlib import Path

FOLDER = Path(__file__).parent


def library() -> Path:
    """The file that is built from the sources beside this file, for this platform: its name carries both.

    So a library that was built from other sources, or on another platform, is never loaded.
    """
    digest = blake2b(digest_size=8)
    for source in sorted(FOLDER.glob("*.[ch]")):
        digest.update(source.read_bytes())
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    return FOLDER / f"sums-{platform}-{digest.hexdigest()}.so"
