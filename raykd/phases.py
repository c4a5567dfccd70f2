"""Phases: responses written and scored, at most ``max_staleness`` of them ahead of the learner.

    learner     | phase 0 | phase 1 | phase 2 | ...
    teachers    0         1         2         3              max_staleness 0: everything in turn
    rollouts    0         1         2         3              max_staleness 1 and more: the lanes overlap

A phase is decided when it is begun, with the weights of that moment: prompts, coin, mixture and policy version do not depend on
how fast anyone is, so a run is reproducible at any staleness. Only where new weights are loaded in flight, phases are written at
the same time, by the versions that come meanwhile; they are learned from in their order all the same, so that short responses
are no sooner learned from than long ones.
"""

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from raykd.algorithms.base import Algorithm, Mixture, Progress
from raykd.experiment import Experiment, Stage
from raykd.prompts import PromptStream
from raykd.records import Prompt, Rollout, Row
from raykd.weights import WeightUpdate
from raykd.workers import Workers


@dataclass(slots=True)
class Position:
    """Where a run stands: with the learner's and the replay's state it is all that a resumed run needs."""

    stage: int = 0
    step: int = 0
    """Optimiser steps done in this stage."""
    total: int = 0
    """Optimiser steps done in the run; also the policy version."""
    held_out: list[float] = field(default_factory=list)
    """Held-out losses of this stage; the first was measured before it."""
    best: dict[str, float] = field(default_factory=dict)
    """Where a stage keeps its best weights: their held-out numbers, and their ``step`` of the run."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What the learner learns from next."""

    progress: Progress
    mixture: Mixture
    rows: list[Row]
    """The new responses, with what the algorithm asks about them."""


@dataclass(frozen=True, slots=True)
class _Begun:
    progress: Progress
    mixture: Mixture
    rows: Future[list[Row]]
    stream: dict[str, Any]
    """State of the prompt stream before the phase took from it."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """The prompts of a phase, and who answers them."""

    given: list[Prompt]
    by_student: list[Prompt]
    by_teacher: list[Prompt]
    mixture: Mixture


class Phases:
    """The phases of a stage in their order. One thread writes, or one for each phase in flight, and one scores; the learner's own
    begins and takes them."""

    def __init__(
        self, experiment: Experiment, stage: Stage, workers: Workers, prompts: PromptStream[Prompt], at: Position
    ) -> None:
        self._experiment, self._stage, self._workers, self._prompts, self._at = experiment, stage, workers, prompts, at
        self._begun: deque[_Begun] = deque()
        self._next_step = at.step
        workers.in_flight = stage.in_flight
        self._writer = ThreadPoolExecutor(1 + stage.max_staleness * stage.in_flight, "writer")
        self._scorer = ThreadPoolExecutor(1, "scorer")

    def next(self) -> Phase:
        """The oldest phase, once it is scored; those that may run ahead are on their way."""
        while len(self._begun) <= self._stage.max_staleness and self._next_step < self._stage.steps:
            self._begin()
        phase = self._begun.popleft()
        with self._workers.usage.measured("wait"):
            rows = phase.rows.result()
        return Phase(phase.progress, phase.mixture, rows)

    @property
    def unlearned(self) -> dict[str, Any]:
        """State of the prompt stream before the phases that nobody has learned from."""
        return self._begun[0].stream if self._begun else self._prompts.state()

    def settle(self) -> None:
        """Wait until nothing is being written or scored."""
        for phase in self._begun:
            phase.rows.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in (self._writer, self._scorer):
            thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        stage, workers = self._stage, self._workers
        ahead = self._next_step - self._at.step
        total = self._at.total + ahead
        progress = Progress(
            step=self._next_step,
            steps=stage.steps,
            batch_size=stage.batch_size,
            coin=float(np.random.default_rng((self._experiment.seed, total)).random()),
            held=workers.call_replay("held", total + stage.steps_per_phase - 1),  # when the last step learns from them
            held_out=tuple(self._at.held_out),
        )
        mixture = stage.algorithm.mixture(progress)
        stream = self._prompts.state()
        asked = self._ask(mixture)
        update = workers.publish() if asked.by_student or asked.by_teacher else None
        written = self._writer.submit(self._write, asked, update, total)
        rows = self._scorer.submit(lambda: assess(workers, written.result(), stage.algorithm))
        self._begun.append(_Begun(progress, mixture, rows, stream))
        self._next_step += stage.steps_per_phase

    def _ask(self, mixture: Mixture) -> _Asked:
        """The prompts, shared out as the algorithm decided: once, for all ranks."""
        samples = self._stage.samples_per_prompt
        num_prompts = self._stage.rows_per_phase // samples
        num_phases = self._next_step // self._stage.steps_per_phase

        def whole(share: float) -> int:
            """A share of this phase's prompts as a whole number; what rounding takes from one phase the next ones give back."""
            before, after = (math.floor(share * num_prompts * count + 0.5) for count in (num_phases, num_phases + 1))
            return after - before

        num_teacher, num_student = whole(mixture.teacher), whole(mixture.student)
        num_given = max(0, whole(mixture.dataset + mixture.student + mixture.teacher) - num_teacher - num_student)
        by_student = self._prompts.take(num_student)
        by_teacher = by_student[:num_teacher] if mixture.same_prompts else self._prompts.take(num_teacher)
        return _Asked(self._prompts.take(num_given * samples), by_student, by_teacher, mixture)

    def _write(self, asked: _Asked, update: WeightUpdate | None, salt: int) -> list[Rollout]:
        rollouts = [Rollout.reference(prompt) for prompt in asked.given]
        for prompts, teacher_share in ((asked.by_student, asked.mixture.teacher_share), (asked.by_teacher, 1.0)):
            if prompts:
                rollouts += self._workers.generate(
                    prompts,
                    update,
                    samples=self._stage.samples_per_prompt,
                    teacher_share=teacher_share,
                    max_tokens=self._experiment.max_response,
                    salt=salt,
                    temperature=asked.mixture.temperature,
                )
        self._workers.sleep()
        return rollouts


def assess(workers: Workers, rollouts: list[Rollout], algorithm: Algorithm) -> list[Row]:
    """Everything that the algorithm asks about the responses: the teacher's scores, the reward."""
    rows = workers.score(rollouts, algorithm.needs, algorithm.top_k) if rollouts else []
    return workers.rate(rows) if algorithm.needs_reward and rows else rows
