"""Policy-gradient surrogates for tokens drawn from another law than the current student's; tensors are per token, ``[...]``."""

import torch
from torch import Tensor


def importance_ratio(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """rho = q(y_t) / mu(y_t) = exp(log q - log mu), mu the law the token was drawn from; range [0, inf).

    Its expectation under mu is 1. For teacher-mixed sampling mu = share p + (1 - share) q, so on-policy rho <= 1 / (1 - share).
    """
    return torch.exp(logprobs - behaviour_logprobs)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)), to be minimised: PPO, Schulman et al., arXiv 1707.06347, eq. 7.

    ``clip=None`` gives the plain importance-weighted -A rho. The gradient is zero where ``is_clipped``.
    """
    plain = -advantages * ratio
    if clip is None:
        return plain
    return torch.maximum(plain, -advantages * ratio.clamp(1 - clip, 1 + clip))


def is_clipped(ratio: Tensor, advantages: Tensor, clip: float | None) -> Tensor:
    """Where the clipped surrogate is flat: the ratio has already moved past the bound in the direction A asks for; bool."""
    if clip is None:
        return torch.zeros_like(ratio, dtype=torch.bool)
    return torch.where(advantages > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantages < 0))


def truncated_importance_weight(logprobs: Tensor, behaviour_logprobs: Tensor, limit: float) -> Tensor:
    """min(rho, limit) without gradient: truncated importance sampling, Ionides 2008; a bounded weight at the price of a bias.

    ``limit`` is positive; with 1 a token is only ever down-weighted.
    """
    if limit <= 0:
        raise ValueError(f"truncated_importance_weight: limit must be positive, got {limit}")
    return importance_ratio(logprobs, behaviour_logprobs).detach().clamp(max=limit)
