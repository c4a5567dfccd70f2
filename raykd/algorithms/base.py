"""The contract of a distillation algorithm: reduce the vocabulary chunk by chunk, then the sequence.

needs                           what the teacher must send
mixture(progress)               who writes the next responses
per_token(student, teacher, tokens) -> {name: [...]}     vocabulary -> token, called on chunks of positions
loss(per_token, batch)          -> loss, metrics         token -> scalar, sees no vocabulary
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from raykd.logprobs import masked_sum
from raykd.records import Batch

PerToken = dict[str, Tensor]

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
"""Sum of the tokens / all tokens; mean of each response / all responses; sum of the tokens / all responses."""


class Needs(StrEnum):
    """What an algorithm needs of the teacher."""

    NOTHING = "nothing"
    SAMPLED = "sampled"
    DISTRIBUTION = "distribution"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a stage stands when it asks who writes next."""

    step: int
    """Optimiser steps done in this stage."""
    steps: int
    """Optimiser steps this stage will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Who writes the responses of the next phase: shares of the rows, decided once for all ranks."""

    dataset: float = 0.0
    student: float = 0.0
    """Written token by token from ``teacher_share * p + (1 - teacher_share) * q``."""
    teacher_share: float = 0.0

    def __post_init__(self) -> None:
        if abs(self.dataset + self.student - 1) > 1e-9 or min(self.dataset, self.student) < 0:
            raise ValueError(
                f"mixture shares must be non-negative and sum to 1, got dataset {self.dataset}, student {self.student}"
            )
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be within [0, 1], got {self.teacher_share}")


class Algorithm(BaseModel, ABC):
    """A frozen, validated value. Its fields are the method's hyper-parameters with the paper's values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @abstractmethod
    def mixture(self, progress: Progress) -> Mixture: ...

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor) -> PerToken:
        """Reduce the vocabulary. ``student`` and ``teacher`` are float32 log-probabilities ``[..., V]`` (``teacher`` is None
        unless ``needs`` is ``distribution``), ``tokens`` the response tokens ``[...]``; every result is ``[...]``."""

    @abstractmethod
    def loss(self, per_token: PerToken, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reduce the sequence. ``per_token`` holds ``[B, T]`` tensors, 0 at padding. The loss and every metric are this
        micro-batch's SHARE: divided by ``batch.totals``, so that the sum over micro-batches and ranks is the step's value."""

    @property
    def rollouts_per_phase(self) -> int | None:
        """Responses written before learning from them; None: one mini-batch."""
        return None

    @property
    def inner_epochs(self) -> int:
        """Passes over the responses of a phase."""
        return 1

    @property
    def text_weight(self) -> float:
        """Weight of the language-modelling loss on plain text beside this method; 0: no plain text."""
        return 0.0


def reduce_tokens(values: Tensor, batch: Batch, reduction: Reduction) -> Tensor:
    """This micro-batch's share of the step's value, ``[B, T] -> []``: divided by ``batch.totals``; an empty response gives 0."""
    if reduction == "token_mean":
        return masked_sum(values, batch.mask) / max(batch.totals.tokens, 1)
    sums = masked_sum(values, batch.mask, dim=-1)
    if reduction == "sequence_mean":
        sums = sums / batch.mask.sum(-1).clamp(min=1)
    return sums.sum() / max(batch.totals.sequences, 1)
