"""Distillation by a divergence per token, on the data set's or the student's responses: KD, ImitKD, GKD."""

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from raykd import divergences
from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress, Reduction, reduce_tokens
from raykd.logprobs import entropy, gather
from raykd.records import Batch


class TokenDivergence(BaseModel):
    """A divergence with its parameters: a value that is called on log-probabilities ``[..., V]`` and gives ``[...]``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor: ...


class ForwardKL(TokenDivergence):
    """KL(p || q)."""

    kind: Literal["forward_kl"] = "forward_kl"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.forward_kl(student, teacher)


class ReverseKL(TokenDivergence):
    """KL(q || p)."""

    kind: Literal["reverse_kl"] = "reverse_kl"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.reverse_kl(student, teacher)


class JSD(TokenDivergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; small beta behaves like forward KL, times beta."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.jensen_shannon(student, teacher, self.beta)


class SkewForwardKL(TokenDivergence):
    """KL(p || alpha p + (1 - alpha) q)."""

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.skew_forward_kl(student, teacher, self.alpha)


class SkewReverseKL(TokenDivergence):
    """KL(q || (1 - alpha) p + alpha q)."""

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.skew_reverse_kl(student, teacher, self.alpha)


class AdaptiveKL(TokenDivergence):
    """Forward and reverse KL weighted by where, head or tail of the teacher, the student is further off."""

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(default=0.5, gt=0, lt=1)
    boundary: divergences.Boundary = "minimal"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.adaptive_kl(student, teacher, self.head_mass, self.boundary)


class TotalVariation(TokenDivergence):
    """1/2 sum |p - q|."""

    kind: Literal["total_variation"] = "total_variation"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.total_variation(student, teacher)


class Jeffreys(TokenDivergence):
    """KL(p || q) + KL(q || p)."""

    kind: Literal["jeffreys"] = "jeffreys"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.jeffreys(student, teacher)


class AlphaBeta(TokenDivergence):
    """The alpha-beta divergence; the defaults are ABKD's for GPT-2 students of 0.3 billion parameters and more."""

    kind: Literal["alpha_beta"] = "alpha_beta"
    alpha: float = Field(default=0.2, gt=0)
    beta: float = Field(default=0.7, gt=0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergences.alpha_beta(student, teacher, self.alpha, self.beta)


AnyDivergence = Annotated[
    ForwardKL | ReverseKL | JSD | SkewForwardKL | SkewReverseKL | AdaptiveKL | TotalVariation | Jeffreys | AlphaBeta,
    Field(discriminator="kind"),
]


class TokenDistillation(Algorithm):
    """L = sum_t D(p(. | x, y_<t), q(. | x, y_<t)), reduced over the tokens of the step; y is a constant, whoever wrote it."""

    divergence: AnyDivergence = ForwardKL()
    reduction: Reduction = "token_mean"

    @property
    def needs(self) -> Needs:
        return Needs.DISTRIBUTION

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor) -> PerToken:
        assert teacher is not None, "the teacher's distribution was declared as needed"
        with torch.no_grad():
            measured = {"nll": -gather(student, tokens), "entropy": entropy(student)}
        return {"divergence": self.divergence(student, teacher), **measured}

    def loss(self, per_token: PerToken, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = reduce_tokens(per_token["divergence"], batch, self.reduction)
        return loss, {name: reduce_tokens(values.detach(), batch, "token_mean") for name, values in per_token.items()}


class KD(TokenDistillation):
    """Word-level distillation: forward KL on the data set's responses; Hinton et al., arXiv 1503.02531; Kim and Rush, 1606.07947.

    No cross-entropy on the data set's tokens is added.
    """

    kind: Literal["kd"] = "kd"

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(dataset=1.0)


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
    not differentiated through the sampling. ``student_share`` is lambda: here the share of rows in every step, in the paper the
    probability of a whole batch, of one expectation. The student should be fine-tuned first.
    """

    kind: Literal["gkd"] = "gkd"
    divergence: AnyDivergence = JSD(beta=0.9)
    student_share: float = Field(default=1.0, ge=0, le=1)

    @classmethod
    def paper(cls) -> "GKD":
        """The paper's reduction: the mean over the positions of a response, then over responses."""
        return cls(reduction="sequence_mean")

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(dataset=1 - self.student_share, student=self.student_share)


class NamedGKD(Algorithm):
    """A method that is a token-level divergence on a share of the student's text: GKD under its own name and hyper-parameters."""

    @property
    @abstractmethod
    def distillation(self) -> GKD:
        """The same objective as a GKD value."""

    @property
    def needs(self) -> Needs:
        return self.distillation.needs

    def mixture(self, progress: Progress) -> Mixture:
        return self.distillation.mixture(progress)

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor) -> PerToken:
        return self.distillation.per_token(student, teacher, tokens)

    def loss(self, per_token: PerToken, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.distillation.loss(per_token, batch)
