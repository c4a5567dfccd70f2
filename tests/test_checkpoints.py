"""Checkpoints: the newest is found, old ones go where asked; the best weights of a stage, also of a run that was resumed."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from raykd.algorithms import SFT
from raykd.checkpoints import forget_bests, forget_checkpoints, keep_best, newest_checkpoint, restore_best, what_is_left
from raykd.experiment import Stage
from raykd.phases import Position

STAGE = Stage(algorithm=SFT(), steps=9, keep="loss")


class Weights:
    """A learner's verbs, of a weight that is a word."""

    def __init__(self) -> None:
        self.word = ""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "word").write_text(self.word)

    def restore(self, folder: Path, version: int) -> None:
        self.word = (folder / "word").read_text()


def test_the_best_of_a_branch_that_was_given_up_is_not_taken(tmp_path: Path) -> None:
    workers: Any = Weights()

    def measured(loss: float, step: int, word: str) -> None:
        at.total, workers.word = step, word
        keep_best(STAGE, {"loss": loss}, workers, tmp_path, at)

    at = Position()
    measured(5.0, 4, "four")
    forget_bests(tmp_path, at)
    checkpoint = deepcopy(at)
    measured(4.0, 5, "given up")
    at = checkpoint
    measured(8.0, 5, "worse")
    assert restore_best(STAGE, {"loss": 8.0}, workers, tmp_path, at) == {"loss": 5.0}
    assert workers.word == "four"
    measured(3.0, 6, "six")
    forget_bests(tmp_path, at)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["best-000006"]


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "driver.json").write_text(f'{{"position": {{"total": {step}}}, "streams": {{}}}}')
    (tmp_path / "checkpoints" / "step-11.partial").mkdir()

    def names() -> list[str]:
        return sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())

    assert what_is_left(tmp_path / "new") == f"stopped before the first checkpoint of {tmp_path / 'new'}"
    assert what_is_left(tmp_path) == f"stopped; --resume {tmp_path} goes on after step 10"
    assert names() == ["step-10", "step-11.partial", "step-2", "step-9"]
    forget_checkpoints(tmp_path, None)
    assert names() == ["step-10", "step-2", "step-9"], "what a crash left unfinished goes"
    forget_checkpoints(tmp_path, 4)
    assert len(names()) == 3
    forget_checkpoints(tmp_path, 2)
    assert names() == ["step-10", "step-9"]
    newest = newest_checkpoint(tmp_path)
    assert newest and newest.position.total == 10 and newest.run == tmp_path
