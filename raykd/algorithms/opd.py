"""On-policy distillation from sampled tokens alone: the per-token reverse KL as an advantage."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress
from raykd.algorithms.gkd import measures
from raykd.logprobs import gather, returns_to_go
from raykd.records import Batch
from raykd.surrogates import clipped_surrogate, importance_ratio, is_clipped


class OPD(Algorithm):
    """Policy gradient with A_t = coefficient (log p(y_t) - log q_old(y_t)) on the student's own text; Thinking Machines, 2025,
    doi 10.64434/tml.20251026.

        L = sum_t -rho_t A_t,   rho_t = q(y_t) / q_old(y_t)

    q_old is the law that was sampled from, so that on-policy the expected gradient is that of KL(q || p) at every visited
    position. The teacher sends one number a token. ``discount`` > 0 adds the discounted advantages of later tokens; at 1 the
    expected gradient is the sequence-level reverse KL's; ``MiniLLM`` has the same with its first term exact: far less variance.
    """

    kind: Literal["opd"] = "opd"
    coefficient: float = Field(default=1.0, gt=0)
    discount: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0, lt=1)
    """Clip rho as PPO does; None: plain importance weighting."""

    @property
    def needs(self) -> Needs:
        return Needs.SAMPLED

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(student=1.0)

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        reverse_kl = batch.student_logprobs - batch.teacher_logprobs
        return {
            "advantage": -self.coefficient * returns_to_go(reverse_kl, batch.mask, self.discount),
            "behaviour": batch.behaviour_logprobs,
            "sampled_reverse_kl": reverse_kl,
        }

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        ratio = importance_ratio(gather(student, tokens), given["behaviour"])
        return {
            "loss": clipped_surrogate(ratio, given["advantage"], self.clip),
            "sampled_reverse_kl": given["sampled_reverse_kl"],
            "importance_weight": ratio.detach(),
            "clip_fraction": is_clipped(ratio, given["advantage"], self.clip).float(),
            **measures(student, tokens),
        }
