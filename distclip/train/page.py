"""report.html in the run's folder, once it has ended: see distclip/reporting."""

from distclip.train.folder import RunFolder

PACKAGES = {"numpy", "plotly"}  # beside rich, which training needs anyway


def page_of(folder: RunFolder) -> str:
    """Write the report, and return where it is, or why there is none: a run has not failed for that."""
    try:
        from rich.console import Console

        from distclip.reporting.command import Options, report
        from distclip.runs import RunError
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        return f'none: it needs {package}: pip install "distclip[report]"'
    try:
        return str(report(Options(runs=[folder.path]), Console(quiet=True)))
    except RunError as error:
        return f"none: {error}"
