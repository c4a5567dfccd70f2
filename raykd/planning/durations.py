"""How long the steps of a stage take on GPUs of some kind, before any is asked for.

Of a model with n numbers that each token is multiplied by, and a head of V rows and width h, a prompt of a tokens and a response
of b take

    forward    2 n (a + b) + 2 V h b flops
    writing    a forward pass; the weights are read b times, for as many responses as an engine writes at the same time
    scoring    a forward pass of the teacher
    learning   three forward passes of the student (two where adapters alone are learned), 2 V h b of the teacher's head, and
               another 2 n (a + b) where layers are computed again

at ``REACHED`` of a data sheet's rates. Texts are as long as they may be, and a prompt of several responses is computed once;
attention, which grows with their length, and what travels are left out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from raykd.algorithms.base import Needs, Progress
from raykd.experiment import Experiment, RolloutConfig, Stage, TeacherConfig
from raykd.planning.size import Size
from raykd.records import Source


class Rates(NamedTuple):
    """Of one GPU, a second."""

    flops: float
    """Dense, bfloat16."""
    bytes: float
    """Read from its memory."""


RATES = {
    "L4": Rates(121e12, 0.30e12),
    "L40S": Rates(362e12, 0.86e12),
    "A100": Rates(312e12, 2.0e12),
    "H100": Rates(989e12, 3.35e12),
    "H200": Rates(989e12, 4.8e12),
    "B200": Rates(2250e12, 7.7e12),
}
"""By the data sheets; of variants the fastest."""
REACHED = 0.4
"""On an H200 scoring reached 0.62, a step of a learner of 1.3B parameters 0.24 (benchmarks/gpu_13b.py)."""


class Work(NamedTuple):
    """What one GPU does."""

    flops: float
    bytes: float = 0.0
    """Of weights, read for one token after the other."""

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bytes) / REACHED


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimiser step of a stage, with its part of a phase's writing and scoring: what one GPU of each kind does."""

    student_writes: Work
    teacher_writes: Work
    scoring: Work
    learning: Work
    overlapping: bool
    """Responses are written ahead, on GPUs of their own."""

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Of the step and of its parts."""
        by_student, by_teacher = self.student_writes.seconds(rates), self.teacher_writes.seconds(rates)
        writing, scoring, learning = by_student + by_teacher, self.scoring.seconds(rates), self.learning.seconds(rates)
        step = max(writing, by_teacher + scoring, learning) if self.overlapping else writing + scoring + learning
        return {"step": step, "writing": writing, "scoring": scoring, "learning": learning}


def durations(experiment: Experiment, student: Size, teacher: Size | None, vocab_size: int, gpu: str) -> Iterator[str]:
    """A sentence on each stage. ValueError for a GPU whose rates are not known, or a worker that has none."""
    if gpu not in RATES:
        raise ValueError(f"--plan {gpu}: the rates of that GPU are not known; choose from {', '.join(RATES)}")
    if without := [role for role, gpus in experiment.gpus_each().items() if not gpus]:
        raise ValueError(f"--plan {gpu} says how long a run takes on GPUs, {', '.join(without)} ask for none; give them some")
    for index, stage in enumerate(experiment.stages):
        load = workload(experiment, stage, student, teacher, vocab_size)
        parts = load.seconds(RATES[gpu])
        step = parts.pop("step")
        hours = step * stage.steps / 3600
        yield (
            f"stages.{index}: about {step:.2g} s a step on {gpu}s ("
            + ", ".join(f"{name} {seconds:.2g}" for name, seconds in parts.items() if seconds)
            + f"{', at the same time' if load.overlapping else ''}), {hours:.2g} hours and {hours * experiment.gpus():.2g} GPU "
            f"hours for {stage.steps:,} steps: with texts as long as they may be, at {REACHED:.0%} of the data sheet's rates"
        )


def workload(experiment: Experiment, stage: Stage, student: Size, teacher: Size | None, vocab_size: int) -> Workload:
    """Of one stage, whose writers write as much as they may."""
    algorithm, learner, teachers, rollout = stage.algorithm, experiment.learner, experiment.teachers, experiment.rollout
    prompt, response = experiment.max_prompt / stage.samples_per_prompt, experiment.max_response
    rows, phases = stage.rows_per_phase, 1 / stage.steps_per_phase

    def layers(model: Size) -> float:
        return 2 * model.computed * (prompt + response)

    def head(model: Size) -> float:
        return 2 * vocab_size * model.width * response

    def writes(model: Size, on: RolloutConfig | TeacherConfig, rows: float, share: float) -> Work:
        """Reads ``rows`` texts and writes a ``share`` of their tokens."""
        parallel = on.engine.tensor_parallel
        passes = share * response * math.ceil(rows / (on.replicas * on.engine.max_sequences))
        flops = rows * (layers(model) + head(model)) / (on.replicas * parallel)
        return Work(phases * flops, phases * passes * model.weight_bytes(on.engine.dtype, parallel))

    mixture = algorithm.mixture(Progress(step=0, steps=1))
    by_student = rows * (mixture.student or float(Source.STUDENT in algorithm.writers))
    student_writes = writes(student, rollout, by_student, 1 - mixture.teacher_share)
    passes = 2 + student.learned / student.parameters
    learning = passes * (layers(student) + head(student)) + layers(student) * learner.activation_checkpointing
    teacher_writes = scoring = Work(0.0)
    if teacher is not None:
        by_teacher = mixture.teacher or (mixture.teacher_share and mixture.student)
        teacher_writes = writes(teacher, teachers, rows * by_teacher, mixture.teacher_share or 1.0)
        if algorithm.needs is not Needs.NOTHING:
            gpus = teachers.replicas * (teachers.engine.tensor_parallel if teachers.backend == "vllm" else 1)
            scoring = Work(phases * rows * (layers(teacher) + head(teacher)) / gpus)
        learning += head(teacher) * algorithm.needs.distribution
    if algorithm.text is not None:
        learning += 2 * passes * (student.computed + vocab_size * student.width) * experiment.text_length
    shared = any(0 < gpus < 1 for gpus in experiment.gpus_each().values())
    return Workload(
        student_writes=student_writes,
        teacher_writes=teacher_writes,
        scoring=scoring,
        learning=Work(stage.batch_size * learning / learner.ranks),
        overlapping=stage.max_staleness > 0 and not shared,
    )
