"""MiniLLM: sequence-level reverse KL by policy gradient, on responses of the student mixed with the teacher."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress, Reduction, reduce_tokens
from raykd.divergences import reverse_kl
from raykd.logprobs import entropy, future_returns, gather, remaining_tokens, returns_to_go
from raykd.records import Batch
from raykd.surrogates import clipped_surrogate, importance_ratio, is_clipped


class MiniLLM(Algorithm):
    """Minimise KL(q || p) over sequences y ~ q(. | x); Gu et al., arXiv 2306.08543.

    Responses are drawn from mu = a p + (1 - a) q_old, a = ``teacher_share``. With rewards r_t = log p(y_t) - log q_old(y_t),
    returns R_t = sum_{k >= 0} discount^k r_{t+1+k} divided by their number of terms, and rho_t = q(y_t) / mu(y_t),

        L = sum_t [ KL(q_t || p_t) + max(-R_t rho_t, -R_t clamp(rho_t, 1 - clip, 1 + clip)) ] + text_coefficient L_PT

    where the first term is exact over the vocabulary and L_PT is the language-modelling loss on plain text. On-policy (a = 0, no
    normalisation, no clip) the expected gradient is that of KL(q || p) over sequences.

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
    reduction: Reduction = "token_mean"
    text_coefficient: float = Field(default=1.0, ge=0)
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
        """The rewards and returns of the public code (microsoft/LMOps at 4f2a9de), for comparisons.

        Left out, because they make a result depend on the padding and the number of devices: whitening over padded positions and
        token means per micro-batch. Also left out: the teacher's half of its plain-text loss.
        """
        return cls(include_current_reward=True, discount=0.95, reward_scale=0.5, reward_clip=100.0)

    @property
    def needs(self) -> Needs:
        return Needs.DISTRIBUTION if self.single_step else Needs.SAMPLED

    @property
    def rollouts_per_phase(self) -> int | None:
        return self.rollouts

    @property
    def inner_epochs(self) -> int:
        return self.epochs

    @property
    def text_weight(self) -> float:
        return self.text_coefficient

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(student=1.0, teacher_share=self.teacher_share)

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor) -> PerToken:
        with torch.no_grad():
            measured = {"entropy": entropy(student)}
        if self.single_step:
            assert teacher is not None, "the teacher's distribution was declared as needed"
            measured["reverse_kl"] = reverse_kl(student, teacher)
        return {"logprob": gather(student, tokens), **measured}

    def advantages(self, batch: Batch) -> Tensor:
        """R_t: the return of the rewards after t (from t on with ``include_current_reward``), without gradient; ``[B, T]``."""
        rewards = (batch.teacher_logprobs - batch.student_logprobs) / self.reward_scale
        if self.reward_clip is not None:
            rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
        returns = (returns_to_go if self.include_current_reward else future_returns)(rewards, batch.mask, self.discount)
        if self.length_normalise:
            returns = returns / remaining_tokens(batch.mask, self.include_current_reward).clamp(min=1)
        return returns.detach()

    def loss(self, per_token: PerToken, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        advantages = self.advantages(batch)
        logprob = torch.where(batch.mask, per_token["logprob"], 0.0)
        ratio = importance_ratio(logprob, torch.where(batch.mask, batch.behaviour_logprobs, 0.0))
        policy_loss = reduce_tokens(clipped_surrogate(ratio, advantages, self.clip), batch, self.reduction)
        loss, metrics = policy_loss, {"policy_loss": policy_loss.detach()}
        if self.single_step:
            exact = per_token["reverse_kl"] * ratio.detach() if self.weight_single_step else per_token["reverse_kl"]
            exact_loss = reduce_tokens(exact, batch, self.reduction)
            loss, metrics = loss + exact_loss, metrics | {"single_step_loss": exact_loss.detach()}
        measured = {
            "sampled_reverse_kl": batch.student_logprobs - batch.teacher_logprobs,
            "advantage": advantages,
            "importance_weight": ratio,
            "importance_weight_squared": ratio.square(),
            "clip_fraction": is_clipped(ratio, advantages, self.clip).float(),
            **{name: values for name, values in per_token.items() if name in ("entropy", "reverse_kl")},
        }
        return loss, metrics | {name: reduce_tokens(values.detach(), batch, "token_mean") for name, values in measured.items()}
