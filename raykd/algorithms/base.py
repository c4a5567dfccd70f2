"""The contract of a distillation algorithm, from who writes down to what a token costs.

needs                                        what the teacher must send
mixture(progress)                            who writes the next responses, once for all ranks
per_step(progress, rows)     -> {name: x}    numbers over the rows of one optimiser step, once for all ranks
per_sequence(batch)          -> {name: [B, T]}   what a token needs of its whole response: no vocabulary, no gradient
per_token(student, teacher, tokens, given)   -> {name: [n]}   vocabulary -> token, on chunks of positions

The loss of a step is sum_t weight_t loss_t, ``loss`` being an entry of ``per_token`` and the weights those of ``reduction``. A
token's loss depends on no other token's distribution: a chunk can be differentiated as soon as it exists, and then be forgotten.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raykd.records import Batch, Row, Source
from raykd.value import Value

PerToken = dict[str, Tensor]

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
"""Sum of the tokens / all tokens; mean of each response / all responses; sum of the tokens / all responses."""


Author = Literal[Source.DATASET, Source.STUDENT, Source.TEACHER]


class Needs(StrEnum):
    """What an algorithm needs of the teacher: the log-prob of every response token, its whole distribution there, or both."""

    NOTHING = "nothing"
    SAMPLED = "sampled"
    DISTRIBUTION = "distribution"
    BOTH = "both"

    @property
    def sampled(self) -> bool:
        """Rows carry the teacher's log-probs."""
        return self in (Needs.SAMPLED, Needs.BOTH)

    @property
    def distribution(self) -> bool:
        """Rows refer to the teacher's distributions."""
        return self in (Needs.DISTRIBUTION, Needs.BOTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a stage stands when it asks who writes next."""

    step: int
    """Optimiser steps done in this stage."""
    steps: int
    """Optimiser steps this stage will do."""
    batch_size: int = 1
    """Responses of one optimiser step."""
    coin: float = 0.0
    """Uniform in [0, 1), drawn anew for every phase: one for all ranks."""
    held: int = 0
    """Responses in the replay buffer that the phase's last step may still learn from."""
    held_out: tuple[float, ...] = ()
    """Held-out losses of this stage so far; the first was measured before it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Who writes the responses of the next phase: shares of the new rows, decided once for all ranks; all 0: nobody writes."""

    dataset: float = 0.0
    student: float = 0.0
    """Written token by token from ``teacher_share * p + (1 - teacher_share) * q``."""
    teacher: float = 0.0
    """Written by the teacher alone."""
    teacher_share: float = 0.0
    temperature: float = 1.0
    """The student samples from softmax(logits / temperature); other than 1 only where it writes alone."""
    same_prompts: bool = False
    """Student and teacher answer the same prompts; else each has its own."""
    into_replay: bool = True
    """The new responses enter the replay buffer."""
    from_replay: bool = True
    """The phase learns from the replay buffer; else from the new responses alone."""

    def __post_init__(self) -> None:
        shares = (self.dataset, self.student, self.teacher)
        if min(shares) < 0 or (abs(sum(shares) - 1) > 1e-9 and (any(shares) or not self.from_replay)):
            raise ValueError(
                "mixture shares must be non-negative and sum to 1 (or all be 0 where the replay buffer is learned from), got "
                f"dataset {self.dataset}, student {self.student}, teacher {self.teacher}"
            )
        if self.from_replay and not self.into_replay:
            raise ValueError("a mixture that learns from the replay buffer must keep what it writes there")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be within [0, 1], got {self.teacher_share}")
        if self.temperature <= 0 or (self.temperature != 1 and (self.teacher or self.teacher_share)):
            raise ValueError(
                f"temperature must be positive, and 1 where the teacher writes; got {self.temperature}, teacher {self.teacher}, "
                f"teacher_share {self.teacher_share}"
            )

    @property
    def writers(self) -> frozenset[Source]:
        """Every source with a share."""
        student = Source.MIXED if self.teacher_share > 0 else Source.STUDENT
        shares = {Source.DATASET: self.dataset, student: self.student, Source.TEACHER: self.teacher}
        return frozenset(source for source, share in shares.items() if share > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a stage asks of its algorithm."""

    rows_per_phase: int
    """Responses written before learning from them, over all ranks."""
    samples_per_prompt: int
    max_response: int
    """Longest response, tokens."""


class Replay(Value):
    """How long responses are kept for another use."""

    capacity: int = Field(default=1000, ge=1)
    """Rows held over all ranks; the oldest leave first."""
    max_age: int | None = Field(default=None, ge=0)
    """Oldest policy version that is learned from, in optimiser steps before the current one; None: any."""
    samples_per_insert: int | None = Field(default=None, ge=1)
    """Uses of a row; None: as many as come, uniformly."""
    shares: dict[Author, float] | None = None
    """Share of each writer's rows in a batch, teacher-mixed ones counting as the student's; None: as they come."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.shares is not None and (min(self.shares.values(), default=-1) < 0 or abs(sum(self.shares.values()) - 1) > 1e-9):
            raise ValueError(f"shares must be non-negative and sum to 1, got {self.shares}")
        return self


class Algorithm(Value, ABC):
    """A frozen, validated value. Its fields are the method's hyper-parameters with the paper's values."""

    reduction: Reduction = "token_mean"

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @abstractmethod
    def mixture(self, progress: Progress) -> Mixture: ...

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        """Reduce the vocabulary. ``student`` and ``teacher`` are log-probabilities ``[n, V]``, at least float32 (``teacher`` is
        None unless ``needs.distribution``), ``tokens`` the response tokens ``[n]``, ``given`` what ``per_sequence`` says
        of them. ``loss`` is minimised, every other entry a metric, averaged over the tokens of the step; all are ``[n]``."""

    def per_step(self, progress: Progress, rows: Sequence[Row]) -> dict[str, float]:
        """Numbers that all responses of an optimiser step share; they are logged, and ``batch.totals.numbers`` holds them."""
        return {}

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss of a token needs to know of its whole response; ``[B, T]``, without gradient."""
        return {}

    def token_weights(self, batch: Batch) -> Tensor:
        """``[B, T]``: what a token's loss counts in the step's. The denominators are the step's own, so that micro-batches and
        ranks sum up to it; an empty response weighs nothing."""
        weights = batch.mask.to(torch.float64)
        if self.reduction == "token_mean":
            weights = weights / max(batch.totals.tokens, 1)
        else:
            weights = weights / max(batch.totals.sequences, 1)
        if self.reduction == "sequence_mean":
            weights = weights / batch.mask.sum(-1, keepdim=True).clamp(min=1)
        return weights

    @property
    def writers(self) -> frozenset[Source]:
        """Everyone who may write a response in a stage: what must be started, and what the data must hold."""
        return self.mixture(Progress(step=0, steps=1)).writers

    @property
    def top_k(self) -> int | None:
        """k, where ``per_token`` sees the teacher's k most probable tokens and all others as one: no more has to be sent."""
        return None

    @property
    def needs_reward(self) -> bool:
        """Whether the responses must be rated by the experiment's reward."""
        return False

    @property
    def replay(self) -> Replay | None:
        """How long responses are kept; None: for the phase that they were written for."""
        return None

    @property
    def rollouts_per_phase(self) -> int | None:
        """Responses written before learning from them; None: one mini-batch."""
        return None

    @property
    def inner_epochs(self) -> int:
        """Passes over the responses of a phase."""
        return 1

    @property
    def text(self) -> "TextTerm | None":
        """The loss on plain text beside this method."""
        return None

    @property
    def held_out(self) -> "HeldOut | None":
        """Why ``mixture`` needs ``Progress.held_out``; None: it does without."""
        return None

    def refusal(self, sizes: Sizes) -> str | None:
        """What is wrong with a stage of such sizes and how to mend it, in words that follow the algorithm's name; else None."""
        return None


class HeldOut(NamedTuple):
    """Parts of a sentence: the algorithm ``does`` something by the held-out loss; where that is not measured, ``otherwise``."""

    does: str
    otherwise: str


class TextTerm(NamedTuple):
    """An algorithm on plain text, and its weight."""

    algorithm: Algorithm
    weight: float
