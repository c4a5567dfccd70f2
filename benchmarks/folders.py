"""Folders for the models, texts and runs of benchmarks and tests."""

import atexit
import shutil
import tempfile
from pathlib import Path


def temporary(name: str) -> Path:
    """One that is gone when this process ends: models of some contenders are hundreds of megabytes."""
    folder = Path(tempfile.mkdtemp(prefix=f"raykd-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
