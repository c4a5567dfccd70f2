"""MiniLLM: sequence-level reverse KL by policy gradient, on responses of the student mixed with the teacher."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress, Sizes, TextTerm
from raykd.algorithms.gkd import KD, measures
from raykd.algorithms.sft import SFT
from raykd.divergences import reverse_kl
from raykd.logprobs import future_returns, gather, remaining_tokens, returns_to_go
from raykd.records import Batch, Row
from raykd.surrogates import clipped_surrogate, importance_ratio, is_clipped


class MiniLLM(Algorithm):
    """Minimise KL(q || p) over sequences y ~ q(. | x); Gu et al., arXiv 2306.08543.

    Responses are drawn from mu = a p + (1 - a) q_old, a = ``teacher_share``. With rewards r_t = log p(y_t) - log q_old(y_t),
    returns R_t = sum_{k >= 0} discount^k r_{t+1+k} divided by their number of terms, and rho_t = q(y_t) / mu(y_t),

        L = sum_t [ KL(q_t || p_t) + max(-R_t rho_t, -R_t clamp(rho_t, 1 - clip, 1 + clip)) ] + text_coefficient L_PT

    where the first term is exact over the vocabulary and L_PT is the language-modelling loss on plain text. On-policy (a = 0, no
    normalisation, no clip) the expected gradient is that of KL(q || p) over sequences. The paper's approximations: with a > 0 the
    exact weight of a token is the running product of the ratios up to it, of which rho_t is the last (prefix and future keep the
    mixture's law); dividing a return by its length and clipping change the objective.

    The bare value is the method without the defects of the public code: the reward at t is not counted in both terms, sum and
    divisor of a return have the same terms, no padding enters a statistic, and tokens are averaged over the whole step.
    """

    kind: Literal["minillm"] = "minillm"
    teacher_share: float = Field(default=0.2, ge=0, lt=1)
    clip: float | None = Field(default=0.2, gt=0, lt=1)
    """None: plain importance weighting."""
    length_normalise: bool = True
    """Divide a return by its number of rewards."""
    single_step: bool = True
    """The exact term; without it the teacher sends only the log-probs of the sampled tokens."""
    weight_single_step: bool = False
    """Weight the exact term by rho, without gradient."""
    include_current_reward: bool = False
    """Start the return at r_t; right without ``single_step``, which already counts it."""
    discount: float = Field(default=1.0, ge=0, le=1)
    reward_scale: float = Field(default=1.0, gt=0)
    """Rewards are divided by it."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Rewards are kept within +-reward_clip after scaling."""
    whiten: Literal["tokens"] | Annotated[int, Field(ge=1)] | None = None
    """Advantages minus their mean, over their standard deviation, both of the whole step: over its tokens, or over so many
    positions a response, padding counted as 0 (which shifts the mean of the real ones)."""
    text_coefficient: float = Field(default=1.0, ge=0)
    text_distillation: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss on plain text that is the teacher's cross-entropy there instead of the text's own."""
    rollouts: int = Field(default=256, ge=1)
    """Responses written before learning from them."""
    epochs: int = Field(default=4, ge=1)
    """Passes over those responses."""

    @classmethod
    def paper(cls) -> "MiniLLM":
        """The paper's final objective as printed: the exact term weighted by rho, summed over tokens, averaged over responses."""
        return cls(weight_single_step=True, reduction="sequence_sum")

    @classmethod
    def lmops(cls) -> "MiniLLM":
        """The public code (microsoft/LMOps at 4f2a9de), for comparisons, its whitening over 256 padded positions included.

        What it does per micro-batch on one device, whitening and token means, is done once for the whole step here: the same
        where a step is one micro-batch.
        """
        return cls(
            include_current_reward=True,
            discount=0.95,
            reward_scale=0.5,
            reward_clip=100.0,
            whiten=256,
            text_distillation=0.5,
        )

    @property
    def needs(self) -> Needs:
        return Needs.BOTH if self.single_step else Needs.SAMPLED

    @property
    def rollouts_per_phase(self) -> int | None:
        return self.rollouts

    @property
    def inner_epochs(self) -> int:
        return self.epochs

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(student=1.0, teacher_share=self.teacher_share)

    @property
    def text(self) -> TextTerm | None:
        if self.text_coefficient == 0:
            return None
        share, reduction = self.text_distillation, self.reduction  # as printed: -log q of a whole text
        algorithm = KD(data_weight=1 - share, reduction=reduction) if share > 0 else SFT(reduction=reduction)
        return TextTerm(algorithm, self.text_coefficient)

    def refusal(self, sizes: Sizes) -> str | None:
        if not isinstance(self.whiten, int) or self.whiten >= sizes.max_response:
            return None
        return (
            f"whitens over {self.whiten} positions a response, but max_response is {sizes.max_response}: "
            "sums over longer ones would be no means; raise whiten, or set it to tokens"
        )

    def advantages(self, log_ratios: Tensor, mask: Tensor) -> Tensor:
        """R_t of log p - log q_old: the return of the rewards after t (from t on with ``include_current_reward``); ``[B, T]``."""
        rewards = log_ratios / self.reward_scale
        if self.reward_clip is not None:
            rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
        returns = (returns_to_go if self.include_current_reward else future_returns)(rewards, mask, self.discount)
        if self.length_normalise:
            returns = returns / remaining_tokens(mask, self.include_current_reward).clamp(min=1)
        return returns

    def per_step(self, progress: Progress, rows: Sequence[Row]) -> dict[str, float]:
        """Mean and standard deviation of the advantages of the step, where they are whitened."""
        if self.whiten is None:
            return {}
        advantages = [self._recorded_advantages(row) for row in rows]
        positions = sum(len(values) if self.whiten == "tokens" else self.whiten for values in advantages)
        mean = sum(float(values.sum()) for values in advantages) / max(1, positions)
        squares = sum(float(values.square().sum()) for values in advantages)
        return {"advantage_mean": mean, "advantage_std": math.sqrt(max(0.0, squares / max(1, positions) - mean**2))}

    def _recorded_advantages(self, row: Row) -> Tensor:
        """Advantages of one response by the log-probs recorded with it; ``[T]``."""
        student, teacher = (torch.tensor(values) for values in (row.rollout.student_logprobs, row.teacher_logprobs))
        return self.advantages((teacher - student)[None], torch.ones(1, len(student), dtype=torch.bool))[0]

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        advantages = self.advantages(batch.teacher_logprobs - batch.student_logprobs, batch.mask)
        if self.whiten is not None:
            mean, std = batch.totals.numbers["advantage_mean"], batch.totals.numbers["advantage_std"]
            advantages = (advantages - mean) / math.sqrt(std**2 + 1e-8)
        return {
            "advantage": advantages,
            "behaviour": batch.behaviour_logprobs,
            "sampled_reverse_kl": batch.student_logprobs - batch.teacher_logprobs,
        }

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        advantage = given["advantage"]
        ratio = importance_ratio(gather(student, tokens), given["behaviour"])
        loss = policy_loss = clipped_surrogate(ratio, advantage, self.clip)
        values = {
            "policy_loss": policy_loss.detach(),
            "sampled_reverse_kl": given["sampled_reverse_kl"],
            "advantage": advantage,
            "importance_weight": ratio.detach(),
            "importance_weight_squared": ratio.detach().square(),
            "clip_fraction": is_clipped(ratio, advantage, self.clip).float(),
            **measures(student, tokens),
        }
        if self.single_step:
            assert teacher is not None, "the teacher's distribution was declared as needed"
            exact = reverse_kl(student, teacher)
            values["reverse_kl"] = exact.detach()
            loss = loss + (exact * ratio.detach() if self.weight_single_step else exact)
        return {"loss": loss, **values}
