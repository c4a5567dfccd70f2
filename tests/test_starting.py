"""Engines that have parts of the same GPU start one after another."""

import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from raykd.engine import starting, turn_on_gpu

DEADLINE_S = 60.0


def take_turns(gpu: str, folder: Path, together: Barrier) -> None:
    """Write down when this process began and ended."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, "TMPDIR": str(folder)}
    together.wait(DEADLINE_S)
    with turn_on_gpu(), turn_on_gpu():
        began = time.monotonic()
        time.sleep(0.3)
        (folder / str(os.getpid())).write_text(f"{began} {time.monotonic()}")


@pytest.mark.parametrize(("gpus", "apart"), [(("3", "3"), True), (("3", "4"), False), (("3,4", "3,4"), False), (("", ""), False)])
def test_those_that_share_one_take_turns(gpus: tuple[str, str], apart: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    processes = [context.Process(target=take_turns, args=(gpu, tmp_path, together)) for gpu in gpus]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    (_, first_end), (second_begin, _) = sorted(
        tuple(map(float, (tmp_path / str(process.pid)).read_text().split())) for process in processes
    )
    assert (second_begin >= first_end) is apart


def test_one_that_waits_too_long_is_told_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr(starting, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(starting, "TURN_DEADLINE_S", 0.05)
    starting._turns.cache_clear()
    with turn_on_gpu():
        starting._turns.cache_clear()  # as another process, which has a lock of its own
        with pytest.raises(RuntimeError, match="GPU 5 is shared, and another process"), turn_on_gpu():
            pass
    starting._turns.cache_clear()
