"""Workers that are killed in the middle of a run, on the real stack: the run ends as if they had lived."""

import os
import signal
import threading
import time
from contextlib import suppress
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from small_runs import small_run

from raykd.algorithms import GKD, SFT
from raykd.algorithms.token_divergences import ReverseKL
from raykd.experiment import EvaluationConfig, Experiment, LearnerConfig, Model, Optimiser, Stage
from raykd.fleet import ActorLost
from raykd.run import Result, run
from raykd.tracking import read_lines

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

FAST = Optimiser(learning_rate=5e-3)
ON_POLICY = Stage(algorithm=GKD(divergence=ReverseKL()), steps=8, batch_size=16, optimiser=FAST)
ALONE = Stage(algorithm=SFT(), steps=400, batch_size=16, optimiser=FAST)
"""Without a teacher, and without anybody who writes."""


def experiment(folder: Path, runs: Path, name: str, **settings: Any) -> Experiment:
    two = LearnerConfig(ranks=2, dtype="float32", micro_batch=8, zero_stage=2)
    alone = {"stages": (ALONE,), "evaluation": EvaluationConfig(prompts=0)}
    return small_run(folder, runs, name=name, learner=two, **alone | settings)


def lines(folder: Path) -> list[dict[str, float]]:
    """Those of steps so far."""
    return [line for line in read_lines(folder / "metrics.jsonl")[0] if "loss" in line]


class Killer(threading.Thread):
    """Kills the last of some actors whenever the next of the given steps has been learned, once for each time it is listed."""

    def __init__(self, folder: Path, steps: list[int], actor: str) -> None:
        super().__init__(daemon=True)
        self._folder, self._left, self._actor = folder, steps, actor
        self.killed = 0

    def run(self) -> None:
        seen = 0
        while self._left:
            learned = [line["step"] for line in lines(self._folder)]
            if self._left[0] in learned[seen:]:
                seen = len(learned)
                os.kill(self._process(), signal.SIGKILL)
                self.killed += 1
                del self._left[0]
            time.sleep(0.005)

    def _process(self) -> int:
        """Its process: Ray is a child of this one, and renames its own."""
        found = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it may be ending
                found += [child.pid] if self._actor in "".join(child.cmdline()) else []
        return max(found)


def killed_run(planned: Experiment, at: list[int], actor: str = "LearnerActor") -> tuple[Result, str]:
    """A run in which a learner rank, or another actor, dies after each of these steps, and what it said."""
    killer, said = Killer(planned.runs / planned.name, list(at), actor), StringIO()
    killer.start()
    result = run(planned, console=Console(file=said, width=500))
    assert killer.killed == len(at)
    return result, said.getvalue()


def on_policy(folder: Path, runs: Path, name: str, **settings: Any) -> Experiment:
    changes = {
        "teacher": Model(path=str(folder)),
        "stages": (ON_POLICY,),
        "evaluation": EvaluationConfig(prompts=8),
        "checkpoint_every": 3,
        "restarts": 1,
    }
    return experiment(folder, runs, name, **changes | settings)


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(on_policy(teacher, tmp_path_factory.mktemp("runs"), "undisturbed"), console=Console(quiet=True))


def began_again(result: Result, undisturbed: Result) -> list[float]:
    """The steps at which a run went on elsewhere than where it was; what it learned is what the undisturbed one did."""
    expected = {line["step"]: line["loss"] for line in lines(undisturbed.folder)}
    for line in lines(result.folder):
        assert line["loss"] == pytest.approx(expected[line["step"]], abs=1e-6)
    assert result.before == pytest.approx(undisturbed.before, abs=1e-5)
    assert result.after == pytest.approx(undisturbed.after, abs=1e-5)
    steps = [line["step"] for line in lines(result.folder)]
    assert {*steps} == {*expected}
    return [after for before, after in pairwise(steps) if after != before + 1]


def test_a_run_whose_learner_is_killed_ends_with_the_same_student(teacher: Path, tmp_path: Path, undisturbed: Result) -> None:
    """Before the first checkpoint and after it; responses are written, scored and learned from as if nothing had been."""
    result, said = killed_run(on_policy(teacher, tmp_path, "killed"), at=[1, 5])
    assert "new workers begin again" in said and "new workers go on after step 3" in said
    assert began_again(result, undisturbed) == [1, 4]


def test_new_workers_go_on_where_no_replica_of_a_fleet_is_left(teacher: Path, tmp_path: Path, undisturbed: Result) -> None:
    """The only one dies once more than it is started again."""
    result, said = killed_run(on_policy(teacher, tmp_path, "unwritten"), at=[4, 5], actor="RolloutActor")
    assert "every replica of the rollout fleet has died" in said and "new workers go on after step 3" in said
    assert began_again(result, undisturbed) == [4]


def test_a_fleet_that_dies_again_and_again_before_a_checkpoint_ends_the_run(teacher: Path, tmp_path: Path) -> None:
    """It was started again already, as often as all workers would be."""
    with pytest.raises(ActorLost, match="every replica of the teacher fleet has died"):
        killed_run(on_policy(teacher, tmp_path, "unscored"), at=[1, 2], actor="TeacherActor")


def test_a_run_that_dies_before_its_next_checkpoint_again_and_again_ends(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ActorLost, match="died"):
        killed_run(experiment(teacher, tmp_path, "hopeless", restarts=1), at=[1, 1])
    assert [line["step"] for line in lines(tmp_path / "hopeless")].count(1) == 2
