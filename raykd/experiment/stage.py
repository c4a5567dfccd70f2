"""One stage of a run: an algorithm, for how long, and how it is optimised."""

from typing import Literal, Self

from pydantic import Field, model_validator

from raykd.algorithms import AnyAlgorithm
from raykd.algorithms.base import Replay
from raykd.value import Positive, Value

Kept = Literal["last", "loss", "forward_kl", "reverse_kl", "rouge_l"]
"""The last weights of a stage, or the best by a held-out number."""
HIGHER_IS_BETTER = frozenset({"rouge_l"})


class Optimiser(Value):
    """AdamW and its learning-rate schedule over the steps of one stage."""

    learning_rate: float = Field(default=5e-6, gt=0)
    learning_rate_min: float = Field(default=0.0, ge=0)
    """Where a cosine or linear schedule ends."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    gradient_limit: float = Field(default=1e4, gt=0)
    """A gradient whose norm is beyond it, or not a number, means nothing whatever it is clipped to: the step is skipped."""
    max_skipped: Positive = 10
    """So many steps skipped in a row end the run."""


class Stage(Value):
    """One algorithm for a number of optimiser steps. Its optimiser starts afresh."""

    algorithm: AnyAlgorithm
    steps: Positive
    batch_size: Positive = 64
    """Responses per optimiser step, over all ranks."""
    samples_per_prompt: Positive = 1
    max_staleness: int = Field(default=0, ge=0)
    """Phases that are written and scored ahead of the learner, while it learns from earlier ones. 0: everything in turn. Without
    GPUs, actors that work at the same time share the cores: give each its part of them as ``threads``."""
    in_flight: bool = False
    """The phases that are ahead are written at the same time, and new weights reach the responses that are being written: no
    engine is idle for the sake of a phase's longest response. Each token keeps the log-prob of its own writer, a response the
    version of its oldest. Takes ``max_staleness`` of 1 or more. When an update comes depends on how fast everyone is: such a run
    does not repeat itself exactly."""
    replay: Replay | None = None
    """How long responses are kept for another use, in place of the algorithm's own bounds. ``samples_per_insert`` is then the
    number of passes over a phase's responses; without it, batches are drawn from all that are held."""
    optimiser: Optimiser = Optimiser()
    keep: Kept = "last"
    """Which weights leave the stage: the last, or those that were best by this held-out number, at a multiple of
    ``evaluation.every`` steps or at the end."""

    @property
    def rows_per_phase(self) -> int:
        """Responses written before learning from them."""
        return max(self.batch_size, self.algorithm.rollouts_per_phase or 0)

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps between two calls to the rollout fleet."""
        passes = (self.replay.samples_per_insert if self.replay else None) or self.algorithm.inner_epochs
        return self.rows_per_phase // self.batch_size * passes

    @property
    def bounds(self) -> Replay:
        """Bounds of the replay buffer: the stage's, else the algorithm's, else every response is used in its own phase only."""
        for_a_phase = Replay(
            capacity=self.rows_per_phase,
            max_age=self.steps_per_phase * (self.max_staleness + 1),
            samples_per_insert=self.algorithm.inner_epochs,
        )
        return self.replay or self.algorithm.replay or for_a_phase

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.rows_per_phase % self.batch_size:
            raise ValueError(
                f"rollouts_per_phase {self.rows_per_phase} is no multiple of batch_size {self.batch_size}: "
                "some responses would never be learned from; change one of them"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt} does not divide batch_size {self.batch_size}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _ahead(self) -> Self:
        if self.in_flight and not self.max_staleness:
            raise ValueError("in_flight writes phases ahead of the learner, and max_staleness is 0: set it to 1 or more")
        return self

    @model_validator(mode="after")
    def _replayable(self) -> Self:
        if self.replay is None:
            return self
        oldest = self.steps_per_phase * (self.max_staleness + 1) - 1
        stays = oldest if self.replay.max_age is None else self.replay.max_age
        if self.replay.capacity < self.rows_per_phase or stays < oldest:
            raise ValueError(
                f"replay would lose responses before they are learned from: a phase writes {self.rows_per_phase}, and the last "
                f"of them is used {oldest} steps later; raise replay.capacity and replay.max_age to that at least"
            )
        writers = {writer.author for writer in self.algorithm.writers}
        if unwritten := {author for author, share in (self.replay.shares or {}).items() if share} - writers:
            raise ValueError(
                f"replay.shares names {', '.join(sorted(unwritten))}, which {type(self.algorithm).__name__} has nobody write"
            )
        return self
