"""The divergences per token that a method can be given: values with their parameters, told apart in JSON by ``kind``."""

from abc import abstractmethod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from raykd import divergences
from raykd.value import Value


class TokenDivergence(Value):
    """A divergence with its parameters: a value that is called on log-probabilities ``[..., V]`` and gives ``[...]``."""

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


OfDistributions = Annotated[
    ForwardKL | ReverseKL | JSD | SkewForwardKL | SkewReverseKL | TotalVariation | Jeffreys | AlphaBeta,
    Field(discriminator="kind"),
]
"""Adaptive KL is left out: all other tokens, taken for one, could be the most probable of all, and be its head."""


class TopK(TokenDivergence):
    """A divergence seen through the teacher's k most probable tokens and one event for all others; an f-divergence's lower bound.

    Without ``tail`` both distributions are renormalised on the k tokens. What the student puts elsewhere is then not seen, and a
    divergence that weighs by the student's mass is smallest where all of it has leaked out: only forward KL may do without.
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1)
    of: OfDistributions = ForwardKL()
    tail: bool = True

    @model_validator(mode="after")
    def _sees_what_leaks(self) -> Self:
        if not self.tail and not isinstance(self.of, ForwardKL):
            raise ValueError(
                f"top_k of {self.of.kind} without the tail is minimised by moving the student's mass out of the teacher's "
                f"{self.k} tokens; set tail to true, or use forward_kl"
            )
        return self

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.of(*divergences.top_k(student, teacher, self.k, tail=self.tail))


AnyDivergence = Annotated[
    ForwardKL | ReverseKL | JSD | SkewForwardKL | SkewReverseKL | AdaptiveKL | TotalVariation | Jeffreys | AlphaBeta | TopK,
    Field(discriminator="kind"),
]
