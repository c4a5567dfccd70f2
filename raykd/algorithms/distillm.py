"""DistiLLM: a skew KL per token, and the schedule by which the student's own text enters and is used again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from raykd.algorithms.base import HeldOut, Mixture, Progress, Replay, TextTerm
from raykd.algorithms.gkd import GKD, NamedGKD
from raykd.algorithms.sft import SFT
from raykd.algorithms.token_divergences import SkewForwardKL, SkewReverseKL
from raykd.records import Row, Source
from raykd.value import Value

SkewKL = Annotated[SkewForwardKL | SkewReverseKL, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveState:
    """All that an ``AdaptiveSchedule`` remembers: two numbers, to be kept in a checkpoint."""

    student_share: float
    """phi: the probability that a step learns from the student's text."""
    reference: float | None = None
    """The validation loss that the next one is compared with; None before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one optimiser step does, on all ranks alike."""

    generate: bool
    """The student writes a batch, which enters the replay buffer."""
    learn_from: Literal["fresh", "replay", "dataset"]


class AdaptiveSchedule(Value):
    """When the student writes and when its old text is used again; Ko et al., arXiv 2402.03898, algorithm 1.

    After a validation, phi rises by ``step``, to 1 at most and never down, if the loss grew by more than ``tolerance``. In an
    optimiser step, u ~ U(0, 1) decides once for all ranks, with s the part of the training that is done:

        u < phi (1 - s)   the student writes a batch into the buffer (first in, first out), the step learns from the buffer
        u < phi           the step learns from the buffer
        otherwise         the step learns from the data set

    The bare value is the paper's, ``code()`` the public code's. The paper's ``step`` (1 / N) and ``tolerance`` are not stated in
    numbers: both have the code's 0.1, in nats and hence dependent on model and vocabulary. Pure: the coin and the number of rows
    held are arguments, the memory is an ``AdaptiveState``.
    """

    start: float = Field(default=0.0, ge=0, le=1)
    """phi before the first validation that raises it; at 0 no student text is used until then."""
    step: float = Field(default=0.1, ge=0, le=1)
    """Added to phi by each raise; 0 keeps phi at ``start``."""
    tolerance: float = Field(default=0.1, ge=0)
    reference: Literal["previous", "last_raise"] = "previous"
    """Compare with the previous validation, L > reference + tolerance, or with the one that last raised phi (at first: the one
    before training), L >= reference + tolerance."""
    generation: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """The part of phi that writes anew once the buffer is filled: 1 - s, 1/2 or s."""
    train_on_fresh: bool = False
    """A step that generates learns from the new batch itself, not from a draw of the buffer."""
    generate_until_full: bool = False
    """Below ``capacity`` every step with u < phi generates; else only while the buffer cannot fill a batch."""
    capacity: int = Field(default=1000, ge=1)
    """Rows of the buffer, over all ranks."""
    max_age: int | None = Field(default=None, ge=0)
    """Oldest student whose responses are used again, in optimiser steps; None: any, as in paper and code."""

    @classmethod
    def code(cls) -> "AdaptiveSchedule":
        """The public code (jongwooko/distillm at d47e77f), with one coin and one buffer for all ranks, not one per rank."""
        return cls(reference="last_raise", train_on_fresh=True, generate_until_full=True)

    def seen(self, losses: Sequence[float]) -> AdaptiveState:
        """The state after these validations; the first was measured before training."""
        state = self.begin()
        for loss in losses:
            state = self.after(loss, state)
        return state

    def begin(self) -> AdaptiveState:
        """The state before the first validation."""
        return AdaptiveState(student_share=self.start)

    def after(self, validation_loss: float, state: AdaptiveState) -> AdaptiveState:
        """The state after a validation; the first, before training, only sets the reference."""
        if not math.isfinite(validation_loss):
            raise ValueError(
                f"adaptive schedule: the validation loss is {validation_loss}, no number to compare with;"
                " lower the learning rate, or check that the held-out prompts have responses"
            )
        if state.reference is None:
            return AdaptiveState(student_share=state.student_share, reference=validation_loss)
        limit = state.reference + self.tolerance
        rises = validation_loss > limit if self.reference == "previous" else validation_loss >= limit
        share = min(1.0, state.student_share + self.step) if rises else state.student_share
        moves = rises or self.reference == "previous"
        return AdaptiveState(student_share=share, reference=validation_loss if moves else state.reference)

    def turn(self, coin: float, done: float, state: AdaptiveState, held: int, batch_size: int) -> Turn:
        """What a step does: ``coin`` uniform in [0, 1), ``done`` = s in [0, 1], ``held`` rows in the buffer.

        The paper does not say what a step does that should learn from a buffer with less than a batch: it generates.
        """
        if coin >= state.student_share:
            return Turn(generate=False, learn_from="dataset")
        part = {"decreasing": 1.0 - done, "constant": 0.5, "increasing": done}[self.generation]
        wanted = max(batch_size, self.capacity) if self.generate_until_full else batch_size
        generate = coin < state.student_share * part or held < wanted
        return Turn(generate=generate, learn_from="fresh" if generate and self.train_on_fresh else "replay")


class DistiLLM(NamedGKD):
    """Skew KL on the data set's and the student's responses; Ko et al., arXiv 2402.03898.

        L = sum_t D(p_t, q_t),   D = SRKL = KL(q || (1 - alpha) p + alpha q)   or   SKL = KL(p || alpha p + (1 - alpha) q)

    averaged over the tokens of the step; alpha 0.1 bounds both by -log 0.1 = 2.3 and keeps their gradients bounded where one of
    the models has hardly any mass. D is a true divergence, 0 at p = q, and the student's part of the mixture is differentiated.

    Whose responses a step learns from is the ``schedule``'s to say: it needs held-out reference answers, measured every
    ``evaluation.every`` steps. On-policy, with a constant share, the same loss is ``GKD(divergence=SkewReverseKL())``.
    """

    kind: Literal["distillm"] = "distillm"
    divergence: SkewKL = SkewReverseKL(alpha=0.1)
    schedule: AdaptiveSchedule = AdaptiveSchedule()
    text_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the language-modelling loss on plain text; the public scripts have 1 for this method, none for its baselines."""

    @classmethod
    def paper(cls) -> "DistiLLM":
        """The bare value."""
        return cls()

    @classmethod
    def code(cls) -> "DistiLLM":
        """The public code's schedule and its loss on plain text."""
        return cls(schedule=AdaptiveSchedule.code(), text_coefficient=1.0)

    @cached_property
    def distillation(self) -> GKD:  # pyright: ignore[reportIncompatibleMethodOverride]  compiled programs read a property anew
        """The same objective as a token-level divergence, whoever wrote the text."""
        return GKD(divergence=self.divergence, importance_limit=self.importance_limit)

    @property
    def writers(self) -> frozenset[Source]:
        return frozenset({Source.DATASET, Source.STUDENT})

    @property
    def replay(self) -> Replay | None:
        return Replay(capacity=self.schedule.capacity, max_age=self.schedule.max_age)

    @property
    def text(self) -> TextTerm | None:
        return TextTerm(SFT(), self.text_coefficient) if self.text_coefficient > 0 else None

    @property
    def held_out(self) -> HeldOut | None:
        return HeldOut("raises its share of student text by", "set schedule.step to 0") if self.schedule.step > 0 else None

    def mixture(self, progress: Progress) -> Mixture:
        turn = self.schedule.turn(
            progress.coin,
            progress.step / progress.steps,
            self.schedule.seen(progress.held_out),
            progress.held,
            progress.batch_size,
        )
        if turn.learn_from == "dataset":
            return Mixture(dataset=1.0, into_replay=False, from_replay=False)
        return Mixture(student=float(turn.generate), from_replay=turn.learn_from == "replay")

    def per_step(self, progress: Progress, rows: Sequence[Row]) -> dict[str, float]:
        return {"student_share": self.schedule.seen(progress.held_out).student_share}
