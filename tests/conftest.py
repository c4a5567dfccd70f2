"""What every test stands on: the environment of its processes, and the folder of data and models."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))  # a script finds what lies beside it; so do its tests

# Before any import of a library that reads them; what the caller has set stays.
os.environ.setdefault("RAYKD_DATA", str(ROOT.parent / "shared"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of models this small a second thread costs more than it computes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines come first: where two processes share the tests, short ones at the end keep both busy."""
    slow = {item.path for item in items if item.get_closest_marker("stack")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder holding data/ and models/; a test that asks for it skips where there is none."""
    folder = Path(os.environ["RAYKD_DATA"])
    if not ((folder / "data").is_dir() and (folder / "models").is_dir()):
        pytest.skip(f"no data/ and models/ under {folder}: set RAYKD_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of whole runs, which learns once for all of them."""
    from small_runs import save_teacher

    return save_teacher(tmp_path_factory.mktemp("teacher"))
