"""What a run folder may hold when a run resumes in it: files of a run, and no link out of the folder."""

from pathlib import Path

from distclip.train.problem import require

FILES = ("config.yaml", "metrics.jsonl", "metrics.tmp", "summary.json", "report.html")


def check_contents(folder: Path) -> None:
    """Check that files are files, folders are folders, and no link leads elsewhere, where the run would write.

    Raises:
        ConfigError: names the first that fails.
        OSError: the folder cannot be read.
    """
    checkpoints = folder / "checkpoints"
    kept = sorted(checkpoints.glob("step-*")) if checkpoints.is_dir() else []
    for path in [*(folder / name for name in FILES), checkpoints, *kept]:
        require(not path.is_symlink(), str(path), "is a link: a run writes only into its own folder")
        kind = "file" if path.name in FILES else "folder"
        right = path.is_file() if kind == "file" else path.is_dir()
        require(right or not path.exists(), str(path), f"is no {kind}: this is not the folder of a run")
