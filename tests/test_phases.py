"""Phases that are written ahead, with everything real but the engines."""

from contextlib import contextmanager
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from overlap import Sleepers

from raykd.algorithms import GKD, DistiLLM, DistiLLM2, ImitKD, MiniLLM
from raykd.algorithms.distillm import AdaptiveSchedule
from raykd.experiment import Stage
from raykd.phases import Phases, Position
from raykd.prompts import PromptStream
from raykd.records import Prompt, Source


@contextmanager
def begun(stage: Stage) -> Any:
    """The phases of a stage, their workers, and where they stand."""
    workers: Any = Sleepers({"generate": 0.0, "score": 0.0})
    workers.call_replay("begin", stage.bounds)
    prompts = PromptStream([Prompt(id=str(i), tokens=(1,), response=(2,)) for i in range(100)], 0)
    experiment: Any = SimpleNamespace(seed=0, max_response=1)
    at = Position(held_out=[1.0])
    with Phases(experiment, stage, workers, prompts, at) as phases:
        yield phases, workers, at


@pytest.mark.parametrize(("max_staleness", "oldest"), [(0, 10), (1, 4), (1, 10), (2, 10)])
def test_rows_that_grow_stale_before_they_are_learned_from_are_written_anew(max_staleness: int, oldest: int) -> None:
    """Written ever less often, from rows that are given out for so long: a phase decides ahead of the step that learns."""
    schedule = AdaptiveSchedule(start=1.0, max_age=oldest)
    stage = Stage(algorithm=DistiLLM(schedule=schedule), steps=300, batch_size=8, max_staleness=max_staleness)
    num_written = 0
    with begun(stage) as (phases, workers, at):
        while at.step < stage.steps:
            phase = phases.next()
            num_written += bool(phase.rows)
            if phase.rows and phase.mixture.into_replay:
                workers.call_replay("add", phase.rows)
            rows = workers.call_replay("sample", stage.batch_size, workers.version) if phase.mixture.from_replay else phase.rows
            assert len(rows) == stage.batch_size
            assert all(workers.version - row.rollout.version <= max(oldest, max_staleness) for row in rows)
            at.step, at.total, workers.version = at.step + 1, at.total + 1, workers.version + 1
    assert num_written < 0.8 * stage.steps


@pytest.mark.parametrize(("batch_size", "samples"), [(8, 4), (4, 1), (16, 2)])
def test_two_writers_answer_the_same_prompts_half_each(batch_size: int, samples: int) -> None:
    stage = Stage(algorithm=DistiLLM2(), steps=1, batch_size=batch_size, samples_per_prompt=samples)
    with begun(stage) as (phases, _, _):
        rollouts = [row.rollout for row in phases.next().rows]
    by_writer = {writer: [r.prompt_id for r in rollouts if r.source is writer] for writer in (Source.STUDENT, Source.TEACHER)}
    assert len(rollouts) == batch_size
    assert by_writer[Source.STUDENT] == by_writer[Source.TEACHER] and len(by_writer[Source.STUDENT]) == batch_size // 2


@pytest.mark.parametrize(("share", "batch_size", "samples"), [(0.5, 1, 1), (0.5, 8, 8), (0.3, 64, 8), (0.9, 4, 1), (0.25, 2, 1)])
def test_a_share_is_kept_over_the_phases_however_few_prompts_one_has(share: float, batch_size: int, samples: int) -> None:
    stage = Stage(algorithm=ImitKD(student_share=share), steps=40, batch_size=batch_size, samples_per_prompt=samples)
    sources: list[Source] = []
    with begun(stage) as (phases, workers, at):
        while at.step < stage.steps:
            rows = phases.next().rows
            assert len(rows) == batch_size
            sources += [row.rollout.source for row in rows]
            at.step, at.total, workers.version = at.step + 1, at.total + 1, workers.version + 1
    assert abs(sources.count(Source.STUDENT) - share * len(sources)) < samples


def test_each_phase_draws_anew_and_at_the_algorithms_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(algorithm=GKD(sampling_temperature=0.7), steps=3, batch_size=2)
    asked: list[dict[str, Any]] = []
    generate = Sleepers.generate
    monkeypatch.setattr(Sleepers, "generate", lambda self, *given, **how: asked.append(how) or generate(self, *given, **how))
    with begun(stage) as (phases, workers, at):
        while at.step < stage.steps:
            phases.next()
            at.step, at.total, workers.version = at.step + 1, at.total + 1, workers.version + 1
    assert [how["salt"] for how in asked] == [0, 1, 2]
    assert {how["temperature"] for how in asked} == {0.7}


@pytest.mark.parametrize("in_flight", [False, True])
def test_phases_ahead_are_written_one_after_another_or_in_flight_and_learned_from_in_their_order(
    monkeypatch: pytest.MonkeyPatch, in_flight: bool
) -> None:
    """The first phase is the last to be written."""
    stage = Stage(algorithm=GKD(), steps=3, batch_size=2, max_staleness=2, in_flight=in_flight)
    generate, writing, others = Sleepers.generate, set(), Event()

    def watched(self: Sleepers, *given: Any, salt: int, **how: Any) -> Any:
        writing.add(salt)
        others.set() if len(writing) == 3 else None
        if salt == 0:
            assert others.wait(timeout=10.0 if in_flight else 0.1) == in_flight
        return generate(self, *given, **how)

    monkeypatch.setattr(Sleepers, "generate", watched)
    asked: list[str] = []
    with begun(stage) as (phases, workers, at):
        assert workers.in_flight == in_flight
        while at.step < stage.steps:
            asked += [row.rollout.prompt_id for row in phases.next().rows]
            at.step, at.total, workers.version = at.step + 1, at.total + 1, workers.version + 1
    stream = PromptStream([Prompt(id=str(i), tokens=(1,), response=(2,)) for i in range(100)], 0)
    assert asked == [prompt.id for prompt in stream.take(6)]


def test_held_rows_are_counted_as_of_the_last_step_that_learns_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps a phase, one phase ahead: the second phase, begun at step 0, is learned from until step 5."""
    stage = Stage(algorithm=MiniLLM(rollouts=6, epochs=1, text_coefficient=0), steps=9, batch_size=2, max_staleness=1)
    counted: list[int] = []
    call = Sleepers.call_replay

    def watched(self: Sleepers, method: str, *arguments: Any) -> Any:
        if method == "held":
            counted.append(arguments[0])
        return call(self, method, *arguments)

    monkeypatch.setattr(Sleepers, "call_replay", watched)
    with begun(stage) as (phases, _, _):
        phases.next()
    assert counted == [2, 5]
