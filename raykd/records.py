"""Every record that crosses a process boundary. Tokens are made once; after that only ids, masks and versions travel.

Shape legend: B sequences, T response tokens, N response tokens of several sequences laid end to end,
V vocabulary, H hidden width. All log-probabilities are natural logarithms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from torch import Tensor

from raykd.payloads import Top


class Source(StrEnum):
    """Who wrote a response."""

    DATASET = "dataset"
    STUDENT = "student"
    MIXED = "mixed"
    TEACHER = "teacher"

    @property
    def author(self) -> "Source":
        """Teacher-mixed text counts as the student's."""
        return Source.STUDENT if self is Source.MIXED else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A tokenised prompt, and the data set's own answer where it has one."""

    id: str
    """Stable name: data set and row, e.g. ``train.jsonl:17``."""
    tokens: tuple[int, ...]
    response: tuple[int, ...] = ()
    """The reference answer, closed by EOS unless it was cut by the length limit."""
    finished: bool = True
    """The reference answer ends by itself (False: the length limit cut it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response to one prompt, with what is needed to learn from it off-policy.

    A response token was drawn from ``teacher_share * p + (1 - teacher_share) * q``: 0 is the student (which may then have a
    ``temperature``), 1 the teacher, in between teacher-mixed sampling. A response from the data set has no sampling law and
    carries no log-probs.
    """

    prompt_id: str
    sample: int
    """Index among the samples of the same prompt in the same step."""
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """The response, EOS included when the writer produced one."""
    source: Source
    teacher_share: float = 0.0
    temperature: float = 1.0
    """The student sampled from softmax(logits / temperature); ``student_logprobs`` are at 1 in any case."""
    student_logprobs: tuple[float, ...] | None = None
    """log q(y_t | x, y_<t) of the student version that wrote the token or read it; [T]."""
    version: int = 0
    """Policy version of the student; the oldest of those that wrote it in flight."""
    finished: bool = True
    """False when the length limit cut the response: a cut response is not an ended one."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_tokens) + len(self.tokens)

    @property
    def first_predicted(self) -> int:
        """Index of the first response token that is predicted: nothing predicts the first of a text without a prompt."""
        return 0 if self.prompt_tokens else 1

    @classmethod
    def reference(cls, prompt: Prompt) -> "Rollout":
        """The data set's own answer to a prompt."""
        return cls(
            prompt_id=prompt.id,
            sample=0,
            prompt_tokens=prompt.tokens,
            tokens=prompt.response,
            source=Source.DATASET,
            finished=prompt.finished,
        )

    def __post_init__(self) -> None:
        if self.student_logprobs is not None and len(self.student_logprobs) != len(self.tokens):
            raise ValueError(
                f"rollout {self.prompt_id}/{self.sample}: {len(self.tokens)} tokens but {len(self.student_logprobs)} log-probs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The teacher on the response positions of several rollouts, rows laid end to end.

    Row n of ``hidden`` (or ``logits``) is the position that predicts response token n. ``hidden`` is the state after
    the final norm, in the teacher's own dtype; times the teacher's head it gives the exact distribution.
    ``log_normaliser`` and ``logprobs`` are the integrity probe: what the teacher itself computed, in float32; NaN on rows that
    it did not look at.
    """

    offsets: tuple[int, ...]
    """Rollout i owns rows ``offsets[i]:offsets[i + 1]``."""
    log_normaliser: Tensor
    """logsumexp of the teacher's logits over the true vocabulary; [N] float32."""
    logprobs: Tensor
    """log p of the response token; [N] float32."""
    hidden: Tensor | None = None
    """[N, H]."""
    logits: Tensor | None = None
    """[N, V] float32."""
    top: Top | None = None
    """The most probable tokens; the probe then looks at response tokens that are among them."""

    def logprobs_by_rollout(self) -> list[Tensor]:
        """log p of the response tokens of each rollout; [T] each."""
        return [self.logprobs[start:end] for start, end in pairwise(self.offsets)]

    def row(self, index: int) -> "Scores":
        """The scores of one rollout of the block."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return Scores(
            offsets=(0, end - start),
            log_normaliser=self.log_normaliser[start:end],
            logprobs=self.logprobs[start:end],
            hidden=None if self.hidden is None else self.hidden[start:end],
            logits=None if self.logits is None else self.logits[start:end],
            top=None if self.top is None else self.top.rows(slice(start, end)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A rollout in the replay buffer: its tokens by value, its teacher scores by reference."""

    rollout: Rollout
    scores: Any = None
    """``ray.ObjectRef`` of a ``Scores`` block (or the block itself where there is no Ray); None when not needed."""
    index: int = 0
    """Which rollout of the block this is."""
    teacher_logprobs: tuple[float, ...] | None = None
    """log p(y_t | x, y_<t); [T]; None where no algorithm asked for it."""
    reward: float = 0.0
    """What the experiment's reward says of the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What all ranks and micro-batches of one optimiser step agree on: denominators, counted after generation, and numbers."""

    tokens: int
    sequences: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the algorithm counted over all rows of the step: its ``per_step``."""

    @classmethod
    def of(cls, rows: Sequence[Row], numbers: Mapping[str, float] | None = None) -> "Totals":
        """Predicted tokens only."""
        predicted = (max(0, len(row.rollout.tokens) - row.rollout.first_predicted) for row in rows)
        return cls(tokens=sum(predicted), sequences=len(rows), numbers=numbers or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What an algorithm's ``per_sequence`` and ``token_weights`` see: padded, response positions only, no vocabulary.

    Padded entries are 0 and ``mask`` is False there. Log-probs are float32 and carry no gradient.
    """

    tokens: Tensor
    """[B, T] int64."""
    mask: Tensor
    """[B, T] bool."""
    totals: Totals
    student_logprobs: Tensor
    """log q_old, recorded at sampling; [B, T]; 0 for data-set rows."""
    teacher_logprobs: Tensor
    """log p; [B, T]; 0 where the algorithm needs nothing of the teacher."""
    behaviour_logprobs: Tensor
    """log(share * p + (1 - share) * q_old), the law the token was drawn from; [B, T]; 0 for data-set rows."""
    by_student: Tensor
    """Whether the student wrote the response, alone or mixed with the teacher; [B] bool."""
    rewards: Tensor
    """[B] float32."""
