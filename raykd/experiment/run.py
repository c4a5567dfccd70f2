"""The whole of a run."""

import os
import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from raykd.algorithms.base import Needs, Sizes
from raykd.experiment.stage import Kept, Stage
from raykd.experiment.workers import LearnerConfig, RewardConfig, RolloutConfig, TeacherConfig
from raykd.records import Source
from raykd.sources import Conversations, Documents, Pairs
from raykd.value import Positive, Value

MEMORY_OF_TWO = 0.45
"""Largest share of a GPU for each of two engines: the head's products want some, too."""
TEACHER_WRITES = frozenset({Source.MIXED, Source.TEACHER})
"""Responses for which the teacher needs an engine of its own."""


class Model(Value):
    """A causal language model: a folder, a run directory (its student), or a name on the Hub."""

    path: str
    """Weights, configuration and tokenizer; with ``scratch``, the tokenizer alone."""
    scratch: dict[str, Any] | None = None
    """Architecture to initialise at random, as fields of a Hugging Face configuration: ``{"model_type": "llama", ...}``."""


class EvaluationConfig(Value):
    """Held-out measures of the student against the teacher, before, between and after the stages."""

    prompts: int = Field(default=64, ge=0)
    """Held-out prompts; they are taken from the data and never trained on. 0 measures nothing."""
    every: int = Field(default=0, ge=0)
    """Also every so many steps within a stage; 0 only between stages."""
    samples: int = Field(default=4, ge=0)
    """How many of the student's answers to them are kept as text each time, in ``samples.jsonl``."""


class TrackingConfig(Value):
    """Where numbers go beside ``metrics.jsonl``."""

    wandb: bool = True
    """Weights & Biases: online when a key is set, files in the run directory otherwise."""
    project: str = "raykd"


class Experiment(Value):
    """A training run: models, data, stages, and the machines they run on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    student: Model
    teacher: Model | None = None
    """None where no stage needs one (SFT)."""
    data: Pairs | Conversations | Documents
    text: Documents | None = None
    """Plain text for the language-modelling loss of methods that have one."""
    text_length: int = Field(default=512, ge=2)
    """Tokens of one chunk of plain text."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    reward: RewardConfig | None = None
    """What rates the student's responses, for methods that add a reward to the distillation."""
    max_prompt: Positive = 256
    """Longest prompt, tokens; longer ones are left out."""
    max_response: Positive = 256
    """Longest response, tokens; longer ones are cut."""
    rollout: RolloutConfig = RolloutConfig()
    teachers: TeacherConfig = TeacherConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint_every: int = Field(default=500, ge=0)
    """Optimiser steps between checkpoints; 0 only at the end of each stage."""
    checkpoints_kept: int | None = Field(default=2, ge=1)
    """How many checkpoints of a run are kept, the newest, which it is resumed from; None: all. One takes 12 bytes a parameter."""
    restarts: int = Field(default=3, ge=0)
    """How often a rollout, teacher or reward replica that dies is started again, and how often all workers are, from the same
    checkpoint, after a learner rank has died. So they are where no replica is left of a fleet and there is a newer checkpoint."""
    seed: int = Field(default=0, ge=0)
    runs: Path = Field(default_factory=lambda: Path(os.environ.get("RAYKD_RUNS", "runs")), validate_default=True)
    """Folder of run directories, each run gets a new one in it. On several machines: storage that all of them see.
    Defaults to the environment variable RAYKD_RUNS, else ``runs``."""

    @field_validator("runs")
    @classmethod
    def _is_a_folder(cls, runs: Path) -> Path:
        if re.match(r"[a-z][a-z0-9+.-]*:/", str(runs)):
            raise ValueError(
                f"{runs} is an address, but run directories are folders: mount the storage (mountpoint-s3, gcsfuse, FSx) on "
                "every node and name the mount"
            )
        return runs

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> Self:
        for index, stage in enumerate(self.stages):
            algorithm, where = stage.algorithm, f"stages.{index}: {type(stage.algorithm).__name__}"
            text = algorithm.text
            needs = {algorithm.needs} | ({text.algorithm.needs} if text else set())
            if self.teacher is None and (needs != {Needs.NOTHING} or algorithm.writers & TEACHER_WRITES):
                raise ValueError(f"{where} needs a teacher, but teacher is not set; name a model")
            if self.text is None and text is not None:
                raise ValueError(
                    f"{where} has text_coefficient {text.weight:g}, but text is not set; "
                    "name plain text, or set text_coefficient to 0"
                )
            if Source.DATASET in algorithm.writers and self.data.no_answers:
                raise ValueError(f"{where} learns from reference answers, but data.{self.data.no_answers}")
            if algorithm.needs_reward and self.reward is None:
                raise ValueError(f"{where} has a reward_weight, but reward is not set; name a function or a classifier")
            if held_out := algorithm.held_out:
                self._measures("loss", f"{where} {held_out.does}", held_out.otherwise)
            sizes = Sizes(
                rows_per_phase=stage.rows_per_phase,
                samples_per_prompt=stage.samples_per_prompt,
                max_response=self.max_response,
            )
            if refusal := algorithm.refusal(sizes):
                raise ValueError(f"{where} {refusal}")
            if stage.keep != "last":
                self._measures(stage.keep, f"stages.{index} keeps the best weights by", "set keep to last")
        return self

    @model_validator(mode="after")
    def _engines_sleep_between_phases(self) -> Self:
        for name, replicas in (("rollout", self.rollout), ("teachers", self.teachers)):
            for index, stage in enumerate(self.stages):
                if replicas.sleep and stage.max_staleness:
                    raise ValueError(
                        f"{name}.sleep rests between the phases, but with stages.{index}.max_staleness {stage.max_staleness} the "
                        f"next phase is written meanwhile; set max_staleness to 0, or {name}.sleep to False"
                    )
        return self

    @model_validator(mode="after")
    def _workers_fit(self) -> Self:
        teachers = self.teachers
        if teachers.backend == "vllm" and teachers.gpus and self.teacher_writes and teachers.engine.memory > MEMORY_OF_TWO:
            raise ValueError(
                f"teachers.engine.memory {teachers.engine.memory:g} is taken twice, by the engine that scores and the one that "
                f"writes; lower it to {MEMORY_OF_TWO:g}, or set teachers.backend to transformers"
            )
        if self.learner.ranks > min(stage.batch_size for stage in self.stages):
            raise ValueError(
                f"learner.ranks {self.learner.ranks} is more than the smallest batch_size of the stages; use fewer ranks"
            )
        return self

    def _measures(self, measure: Kept, who: str, otherwise: str) -> None:
        """Whether a held-out number exists within a stage."""
        evaluation = self.evaluation
        if not evaluation.every or not evaluation.prompts:
            raise ValueError(
                f"{who} the held-out {measure}, but evaluation.every is {evaluation.every} and evaluation.prompts "
                f"{evaluation.prompts}; set both, or {otherwise}"
            )
        if measure != "reverse_kl" and self.data.no_answers:
            raise ValueError(
                f"{who} the held-out {measure} of reference answers, but data.{self.data.no_answers}, or {otherwise}"
            )
        if measure in ("forward_kl", "reverse_kl") and self.teacher is None:
            raise ValueError(f"{who} the held-out {measure}, but teacher is not set; name a model, or {otherwise}")

    @property
    def max_length(self) -> int:
        """Longest prompt and response together, tokens."""
        return self.max_prompt + self.max_response

    @property
    def teacher_writes(self) -> bool:
        """Whether any stage has the teacher write responses, or tokens of mixed ones."""
        return any(stage.algorithm.writers & TEACHER_WRITES for stage in self.stages)

    @property
    def teacher_starts_vllm(self) -> bool:
        """Whether a teacher's worker has an engine of vLLM, to score or to write."""
        return self.teachers.backend == "vllm" or self.teacher_writes

    @property
    def writes_responses(self) -> bool:
        """Whether responses are written that are not in the data: to learn from, or to be measured."""
        measured = self.teacher is not None or any(stage.keep == "rouge_l" for stage in self.stages)
        learned = any(stage.algorithm.writers - {Source.DATASET} for stage in self.stages)
        return learned or (measured and self.evaluation.prompts > 0)

    @property
    def num_rollouts(self) -> int:
        """Rollout replicas that are started."""
        return self.rollout.replicas if self.writes_responses else 0

    @property
    def num_teachers(self) -> int:
        """Teacher replicas that are started."""
        return self.teachers.replicas if self.teacher else 0

    def threads(self) -> int:
        """CPU threads that compute at the same time: those of the busiest stage of the pipeline, or of all where they overlap."""
        write = self.num_rollouts * self.rollout.engine.threads
        if self.teacher_writes:
            write += self.num_teachers * self.teachers.engine.threads
        lanes = write, self.num_teachers * self.teachers.threads, self.learner.ranks * self.learner.threads
        return sum(lanes) if any(stage.max_staleness for stage in self.stages) else max(lanes)

    def gpus_each(self) -> dict[str, float]:
        """GPUs of one worker of each kind that is started, by the name of the setting."""
        each = {"learner.gpus": self.learner.gpus}
        each |= {"teachers.gpus": self.teachers.gpus} if self.num_teachers else {}
        return each | ({"rollout.gpus": self.rollout.gpus} if self.num_rollouts else {})

    def gpus(self) -> float:
        """GPUs the whole run asks for."""
        teachers = self.num_teachers * self.teachers.gpus
        gpus = self.num_rollouts * self.rollout.gpus + teachers + self.learner.ranks * self.learner.gpus
        return round(gpus, 4)  # Ray's own precision of the shares of a GPU
