"""What a run's numbers say of it."""

import json
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from raykd import tracking
from raykd.tracking import Tracker, read_lines
from raykd.usage import Usage, advice, shares
from raykd.workers import Workers


@pytest.mark.parametrize(
    ("busy", "ahead", "expected"),
    [
        (
            {"wait": 8, "generate": 6, "score": 2, "learn": 2},
            (0, False),
            "80% of the time, mostly for the rollout replicas.*max_staleness 1",
        ),
        (
            {"wait": 5, "generate": 2, "score": 4, "learn": 5},
            (1, False),
            "50% of the time, mostly for the teacher replicas: more of them",
        ),
        ({"wait": 0.5, "generate": 6, "learn": 9, "publish": 0.5}, (1, False), "more learner ranks would help"),
        (
            {"wait": 103, "generate": 2, "score": 1, "rate": 100, "learn": 10},
            (0, False),
            "mostly for the reward, which has one actor: a cheaper reward would help, or max_staleness 1",
        ),
        ({"wait": 3, "learn": 10}, (0, False), "23% of the time, for no rollout, teacher or reward: replicas would not help$"),
        ({"wait": 5, "generate": 9, "learn": 5}, (1, False), "rollout replicas: more of them would help, or in_flight keeps"),
        ({"wait": 5, "generate": 9, "learn": 5}, (1, True), "rollout replicas: more of them would help$"),
    ],
)
def test_advice_names_what_held_the_run_up(
    tmp_path: Path, busy: dict[str, float], ahead: tuple[int, bool], expected: str
) -> None:
    halves = json.dumps({"step": 1, **{f"seconds/{verb}": seconds / 2 for verb, seconds in busy.items()}})
    (tmp_path / "metrics.jsonl").write_text(f'{halves}\n{halves}\n{{"step": 2, "seco')
    assert re.search(expected, advice(tmp_path, *ahead))


def test_a_run_that_died_within_a_line_goes_on_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with Tracker(tmp_path, {}, name="x", wandb=False, project="x", console=Console(quiet=True)) as tracker:
        tracker.log(2, {"loss": 0.5})
    lines, unread = read_lines(tmp_path / "metrics.jsonl")
    assert ([line["step"] for line in lines], lines[-1]["loss"], unread) == ([1, 2], 0.5, 1)


@pytest.mark.parametrize(("pause", "said"), [(60.0, [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]), (0.0, [*range(1, 22)])])
def test_the_log_of_a_job_has_a_line_for_every_tenth_of_a_stage_and_after_a_silence(
    pause: float, said: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LINE_EVERY_S", pause)
    log = StringIO()
    with Tracker(tmp_path, {}, name="x", wandb=False, project="x", console=Console(file=log)) as tracker:
        tracker.begin("stage 0: SFT", 20)
        for step in range(1, 21):
            tracker.log(step, {"loss": 0.5}, {"learner": 0.25})
        tracker.begin("stage 1: GKD", 1000, done=20)
        tracker.log(21, {"loss": 0.5})
    lines = log.getvalue().splitlines()
    assert [int(re.findall(r"  (\d+)/", line)[0]) for line in lines] == said
    assert lines[0] == "stage 0: SFT  1/20  loss 0.500  learner 25% busy", "nothing is known about its speed yet"
    assert re.match(r"stage 0: SFT  (3|4)/20  0:00:01 left  loss 0.500  learner 25% busy$", lines[2])
    assert re.match(r"stage 0: SFT  20/20  loss", lines[-2]) and lines[-1] == "stage 1: GKD  21/1000  loss 0.500"


def test_a_run_that_is_still_going_on_is_not_resumed_beside_itself(tmp_path: Path) -> None:
    run = {"name": "x", "wandb": False, "project": "x", "console": Console(quiet=True)}
    with Tracker(tmp_path, {}, **run) as tracker:
        tracker.log(1, {"loss": 0.5})
        with pytest.raises(ValueError, match="is being written by a run that is still going on; end that one first"):
            Tracker(tmp_path, {}, **run)
    with Tracker(tmp_path, {}, **run) as tracker:
        tracker.log(2, {"loss": 0.25})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")[0]] == [1, 2]


def test_an_answer_may_hold_what_unicode_calls_a_line_separator(tmp_path: Path) -> None:
    sample = {"prompt": "a", "student": "one\u2028two\u2029three\x85four\r\nfive"}
    with Tracker(tmp_path, {}, name="x", wandb=False, project="x", console=Console(quiet=True)) as tracker:
        tracker.log_samples(3, [sample])
    assert read_lines(tmp_path / "samples.jsonl") == ([{"step": 3, **sample}], 0)


def test_a_step_says_what_share_of_its_sample_counts() -> None:
    """Of the whole step's weights, which the ranks hand in their shares of."""
    of_ranks = [{"importance_weight": 0.25, "importance_weight_squared": 1.0}] * 2
    learner: Any = SimpleNamespace(ranks=["first", "second"], each=lambda *_: of_ranks)
    workers = Workers(learner=learner, replay=None, usage=Usage(["learner"]))
    assert workers.step([], 0.0)["effective_sample_share"] == 0.125


def test_a_step_is_charged_with_its_own_time_whoever_works_ahead() -> None:
    """The rollout fleet writes for 6 s, the learner steps twice meanwhile; the teacher has nothing to do."""
    now = [0.0]
    usage = Usage(("rollout", "teacher", "learner"), clock=lambda: now[0])
    with usage.measured("generate") as writing:
        with usage.measured("learn"):
            now[0] = 3.0
        now[0] = 4.0
        first = usage.take()
        with usage.measured("learn"):
            now[0] = 6.0
        writing.tokens = 60
    now[0] = 8.0
    second = usage.take()
    waiting = {"waiting/rollout": 0.0, "waiting/teacher": 4.0, "waiting/learner": 1.0}
    assert first == {"seconds/generate": 4.0, "seconds/learn": 3.0} | waiting
    assert second == {"seconds/generate": 2.0, "tokens/generate": 60, "seconds/learn": 2.0} | {
        "waiting/rollout": 2.0,
        "waiting/teacher": 4.0,
        "waiting/learner": 2.0,
    }
    assert shares(second) == {"rollout": 0.5, "teacher": 0.0, "learner": 0.5}


@pytest.mark.parametrize("verb", ["learn", "publish", "evaluate", "save"])
def test_a_learner_that_works_does_not_wait(verb: str) -> None:
    now = [0.0]
    usage = Usage(("learner",), clock=lambda: now[0])
    with usage.measured(verb):
        now[0] = 2.0
    now[0] = 3.0
    assert usage.take() == {f"seconds/{verb}": 2.0, "waiting/learner": 1.0}


def test_what_runs_for_two_phases_at_the_same_time_is_counted_once() -> None:
    now = [0.0]
    usage = Usage(("rollout",), clock=lambda: now[0])
    with usage.measured("generate") as first:
        now[0] = 2.0
        with usage.measured("generate") as second:
            now[0] = 3.0
            assert usage.take() == {"seconds/generate": 3.0, "waiting/rollout": 0.0}
            now[0] = 5.0
            second.tokens = 10
        now[0] = 6.0
        first.tokens = 20
    now[0] = 10.0
    assert usage.take() == {"seconds/generate": 3.0, "tokens/generate": 30, "waiting/rollout": 4.0}


def test_a_key_that_weights_and_biases_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"Weights & Biases: .*; mend WANDB_API_KEY, or unset it"):
        Tracker(tmp_path, {}, name="x", wandb=True, project="x", console=Console(quiet=True))


def test_a_resumed_run_goes_on_with_its_own_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, also where a key is set; a step that is logged again after a crash is not dropped as old."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for last in (3, 2):
        with Tracker(tmp_path, {}, name="x", wandb=True, project="x", console=Console(quiet=True)) as tracker:
            for step in range(1, last + 1):
                tracker.log(step, {"loss": 1.0})
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert first.stem == second.stem == f"run-{(tmp_path / 'wandb_id').read_text()}"
