"""Distillation by a divergence per token, on the data set's or the student's responses: KD, ImitKD, GKD."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress
from raykd.algorithms.token_divergences import JSD, AnyDivergence, ForwardKL, TopK
from raykd.logprobs import entropy, gather
from raykd.records import Batch, Row, Source
from raykd.surrogates import clipped_surrogate, importance_ratio, truncated_importance_weight


class TokenDistillation(Algorithm):
    """L = sum_t D(p(. | x, y_<t), q(. | x, y_<t)), reduced over the tokens of the step; y is a constant, whoever wrote it."""

    divergence: AnyDivergence = ForwardKL()
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened to softmax(logits / temperature) in the divergence; no factor temperature^2 is added."""
    importance_limit: float | None = Field(default=None, gt=0)
    """Weigh each token of the student's text by min(q / q_old, limit), without gradient: truncated importance sampling, for
    text of an older policy (a stage's ``max_staleness``, replay). None: every token counts the same, as in the papers."""

    @property
    def needs(self) -> Needs:
        return Needs.DISTRIBUTION

    @property
    def top_k(self) -> int | None:
        return self.divergence.k if isinstance(self.divergence, TopK) and self.temperature == 1 else None

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        assert teacher is not None, "the teacher's distribution was declared as needed"
        divergence = self.divergence(softened(student, self.temperature), softened(teacher, self.temperature))
        values = {"loss": divergence, "divergence": divergence.detach(), **measures(student, tokens)}
        if self.importance_limit is not None:
            weight = truncated_importance_weight(-values["nll"], given["behaviour"], self.importance_limit)
            weight = torch.where(given["by_student"], weight, 1.0)
            values |= {"loss": weight * divergence, "importance_weight": weight}
        return values

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        if self.importance_limit is None:
            return {}
        return {"behaviour": batch.behaviour_logprobs, "by_student": batch.by_student[:, None].expand(batch.mask.shape)}


def softened(logprobs: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) from the log-probs at temperature 1; ``[..., V] -> [..., V]``."""
    return logprobs if temperature == 1 else torch.log_softmax(logprobs / temperature, dim=-1)


@torch.no_grad()
def measures(student: Tensor, tokens: Tensor) -> PerToken:
    """What is worth watching of any student: the cross-entropy of the text and the entropy of the distribution."""
    return {"nll": -gather(student, tokens), "entropy": entropy(student)}


class KD(TokenDistillation):
    """Word-level distillation on the data set's responses; Hinton et al., arXiv 1503.02531; Kim and Rush, 1606.07947.

    L = (1 - data_weight) KL(p || q) - data_weight log q(y_t). No cross-entropy on the data set's tokens is added by default; the
    baselines of MiniLLM (arXiv 2306.08543) have ``data_weight`` 0.5.
    """

    kind: Literal["kd"] = "kd"
    data_weight: float = Field(default=0.0, ge=0, le=1)

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(dataset=1.0)

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        values = super().per_token(student, teacher, tokens, given)
        if self.data_weight > 0:
            values["loss"] = (1 - self.data_weight) * values["loss"] - self.data_weight * gather(student, tokens)
        return values


class ImitKD(TokenDistillation):
    """Imitation: forward KL, half on the student's own responses, half on the data set's; Lin et al., arXiv 2009.07253.

    The share is constant (GKD's form of it, arXiv 2306.13649, section 3), not annealed.
    """

    kind: Literal["imit_kd"] = "imit_kd"
    student_share: float = Field(default=0.5, ge=0, le=1)

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(dataset=1 - self.student_share, student=self.student_share)


class GKD(TokenDistillation):
    """Generalised distillation; Agarwal et al., arXiv 2306.13649.

    L = (1 - lambda) E_{(x, y) ~ data}[D(p, q)(y | x)] + lambda E_{x, y ~ q}[D(p, q)(y | x)], D summed over the positions of y and
    not differentiated through the sampling. ``student_share`` is lambda: the share of the rows of every step, or with ``coin``
    the probability that a whole step is the student's (algorithm 1); of one expectation. The student should be fine-tuned first.

    With ``reward_weight`` r > 0 it minimises (1 - r) E[D] - r E_{y ~ q}[reward(y)] (equation 5, whose alpha is 1 - r) on the
    student's own responses: the reward by policy gradient, with the mean reward of the step's other responses as baseline.
    """

    kind: Literal["gkd"] = "gkd"
    divergence: AnyDivergence = JSD(beta=0.9)
    student_share: float = Field(default=1.0, ge=0, le=1)
    coin: bool = False
    """Decide who writes for whole steps at a time."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    """The student samples from softmax(logits / sampling_temperature); the divergence has its own ``temperature``."""
    reward_weight: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _rewards_own_text(self) -> Self:
        if self.reward_weight > 0 and self.student_share < 1:
            raise ValueError(
                f"reward_weight {self.reward_weight} rewards the student's own responses, but student_share is "
                f"{self.student_share}; set it to 1"
            )
        if self.sampling_temperature != 1 and (self.reward_weight > 0 or self.importance_limit is not None):
            raise ValueError(
                f"sampling_temperature {self.sampling_temperature} has no place beside reward_weight and importance_limit: their "
                "importance ratios are those of sampling at 1; set it to 1"
            )
        return self

    @classmethod
    def paper(cls) -> "GKD":
        """Algorithm 1 and the paper's reduction: the mean over the positions of a response, then over responses."""
        return cls(reduction="sequence_mean", coin=True)

    @classmethod
    def trl(cls) -> "GKD":
        """The defaults of TRL's GKDTrainer (1.16): sampling at 0.9 while the divergence is at 1, the mean over all tokens, a coin
        a step (TRL: a micro-batch). Its responses have at most 128 tokens: ``Experiment.max_response``."""
        return cls(divergence=JSD(beta=0.5), student_share=0.5, coin=True, sampling_temperature=0.9)

    def mixture(self, progress: Progress) -> Mixture:
        student = float(progress.coin < self.student_share) if self.coin else self.student_share
        return Mixture(dataset=1 - student, student=student, temperature=self.sampling_temperature)

    @property
    def writers(self) -> frozenset[Source]:
        return Mixture(dataset=1 - self.student_share, student=self.student_share).writers

    @property
    def needs_reward(self) -> bool:
        return self.reward_weight > 0

    def per_step(self, progress: Progress, rows: Sequence[Row]) -> dict[str, float]:
        return {"reward": sum(row.reward for row in rows) / max(1, len(rows))} if self.needs_reward else {}

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        """The advantage r(y) - mean of the others' rewards, counted once a response whatever the reduction of D is."""
        given = super().per_sequence(batch)
        if not self.needs_reward:
            return given
        count = max(1, batch.totals.sequences)
        others = count / max(1, count - 1) * (batch.rewards - batch.totals.numbers["reward"])
        weights = self.token_weights(batch)
        scale = torch.where(batch.mask, 1 / count / weights, 0.0)
        return given | {"advantage": others[:, None] * scale, "behaviour": batch.behaviour_logprobs}

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        values = super().per_token(student, teacher, tokens, given)
        if self.needs_reward:
            ratio = importance_ratio(gather(student, tokens), given["behaviour"])
            reward_loss = clipped_surrogate(ratio, given["advantage"], clip=None)
            values["loss"] = (1 - self.reward_weight) * values["loss"] + self.reward_weight * reward_loss
        return values


class NamedGKD(Algorithm):
    """A method that is a token-level divergence on a share of the student's text: GKD under its own name and hyper-parameters."""

    importance_limit: float | None = Field(default=None, gt=0)
    """As in ``GKD``: for text of an older policy."""

    @property
    @abstractmethod
    def distillation(self) -> TokenDistillation:
        """The same objective as a GKD value."""

    @property
    def needs(self) -> Needs:
        return self.distillation.needs

    @property
    def top_k(self) -> int | None:
        return self.distillation.top_k

    def mixture(self, progress: Progress) -> Mixture:
        return self.distillation.mixture(progress)

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        return self.distillation.per_sequence(batch)

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        return self.distillation.per_token(student, teacher, tokens, given)
