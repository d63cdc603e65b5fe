"""The report as one HTML file that needs no network: the page's own files, plotly.js and the numbers, put together."""

import html
import json
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

PARTS = files("distclip.reporting") / "assets"
GENERATOR = '<meta name="generator" content="distclip report">'  # by which a file is known as ours


def page_of(document: dict[str, Any]) -> str:
    """The whole page. Names in it come from files of others: they are data, in no place where a browser runs them."""
    names = ", ".join(run["name"] for run in document["runs"])
    parts = {
        "generator": GENERATOR,
        "title": html.escape(f"Gradient norms: {names[:200]}"),
        "style": part("page.css"),
        "data": json.dumps(document, allow_nan=False).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
        "script": part("page.js"),
    }
    page = part("page.html")
    for name, content in parts.items():
        before, mark, after = page.partition(f"<!--{name}-->")
        assert mark, f"page.html has no place for {name}"
        page = before + content + after
    return page


def part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
