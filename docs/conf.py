"""Settings of Sphinx; `bash docs/build.sh` builds the pages."""

import os.path
import re
from pathlib import Path

from sphinx.application import Sphinx

from distclip import __version__

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")  # one that is relative
SHOWN = {  # pages that are files elsewhere
    DOCS / "explanation/benchmarks.md": ROOT / "benchmarks/README.md",
    DOCS / "explanation/contributing.md": ROOT / "CONTRIBUTING.md",
    DOCS / "explanation/mutants.md": ROOT / "tests/mutation/README.md",
    DOCS / "explanation/security.md": ROOT / "SECURITY.md",
    DOCS / "reference/changelog.md": ROOT / "CHANGELOG.md",
    DOCS / "reference/gpu-check.md": ROOT / "tests/gpu/README.md",
}
PAGES = {file: page for page, file in SHOWN.items()}

project = "distclip"
release = version = __version__
copyright = "the distclip authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
highlight_language = "none"  # blocks without a language are output
default_role = "code"  # `x` in a docstring is code, as in Markdown

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["accelerate", "deepspeed", "lightning", "transformers"]  # too large for a build of pages
python_maximum_signature_line_length = 88

html_theme = "furo"  # its fonts are those of the reader's system: nothing is loaded from elsewhere
html_title = f"distclip {__version__}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["page.css"]


def setup(app: Sphinx) -> None:
    app.connect("source-read", show_files)


def show_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the text of a file in the place of its page, and let links to such files lead to their pages."""
    page = DOCS / f"{name}.md"
    file = SHOWN.get(page, page)
    if file != page:
        app.env.note_dependency(file)
        source[0] = file.read_text(encoding="utf-8")

    def link(match: re.Match[str]) -> str:
        target = (file.parent / match[2]).resolve()
        return match[1] + os.path.relpath(PAGES.get(target, target), page.parent)

    source[0] = LINK.sub(link, source[0])
