"""The best weights of a stage, and a run that is resumed from before they were best."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from raykd.algorithms import SFT
from raykd.experiment import Stage
from raykd.phases import Position
from raykd.validation import forget_bests, keep_best, restore_best

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
