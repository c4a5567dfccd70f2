"""AKL: forward and reverse KL, weighted position by position by where the student is further off."""

from functools import cached_property
from typing import Literal

from pydantic import Field

from raykd.algorithms.gkd import GKD, NamedGKD
from raykd.algorithms.token_divergences import AdaptiveKL
from raykd.divergences import Boundary


class AKL(NamedGKD):
    """Adaptive KL on the data set's responses; Wu et al., arXiv 2404.02657.

    At every position t, over the whole vocabulary,

        L_t = w KL(p || q) + (1 - w) KL(q || p),    w = sum_{v in head} |p_v - q_v| / sum_v |p_v - q_v|

    averaged over the tokens of the step. w carries no gradient and is 1/2 where p = q, where both KLs' gradients vanish. The head
    is taken from the teacher's tokens in falling order of probability, c_i being the mass of the first i:

        minimal   the smallest set of mass >= head_mass: the token that crosses head_mass is in the head
        prefix    the tokens with c_i <= head_mass, and always the first: that token is in the tail (the official code)

    They agree where the first token alone has mass >= head_mass, and where some c_i equals it. The paper's reason: in few epochs
    forward KL fits the head first, reverse KL the tail first, so each weighs as much as the error that it mends.
    ``student_share`` > 0 learns that share of the rows from the student's own responses: an extension, the paper trains on the
    data set alone.
    """

    kind: Literal["akl"] = "akl"
    head_mass: float = Field(default=0.5, gt=0, lt=1)
    boundary: Boundary = "minimal"
    student_share: float = Field(default=0.0, ge=0, le=1)

    @cached_property
    def distillation(self) -> GKD:  # pyright: ignore[reportIncompatibleMethodOverride]  compiled programs read a property anew
        """The same objective as a token-level divergence on a share of the student's text."""
        divergence = AdaptiveKL(head_mass=self.head_mass, boundary=self.boundary)
        return GKD(divergence=divergence, student_share=self.student_share, importance_limit=self.importance_limit)
