"""Log-probabilities and masked sequences. Shapes: B sequences, T response tokens, V vocabulary.

Half-precision inputs are computed in float32; float64 stays float64.
"""

import torch
from torch import Tensor


def promote(values: Tensor) -> Tensor:
    """The same values in at least float32: float16 and bfloat16 become float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def log_softmax(logits: Tensor) -> Tensor:
    """log softmax over the vocabulary, at least float32; ``[..., V] -> [..., V]``."""
    return torch.log_softmax(promote(logits), dim=-1)


def gather(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """The entry of the chosen token; ``[..., V], [...] int64 -> [...]``."""
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def entropy(logprobs: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v, with 0 log 0 = 0; ``[..., V] -> [...]``, within [0, log V]. Without a gradient."""
    logprobs = promote(logprobs)
    if can_look(logprobs) and all_finite(values := -logprobs.exp().mul_(logprobs).sum(-1)):
        return values
    return -logprobs.exp().mul_(logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def can_look(values: Tensor) -> bool:
    """Whether Python may branch on these numbers: a GPU would have to be waited for, a compiled program would end there."""
    return values.is_cpu and not torch.compiler.is_compiling()


def all_finite(values: Tensor) -> bool:
    """Whether sums over the vocabulary are finite: no entry was infinite then, and passes over infinities are spared."""
    return bool(values.isfinite().all())


def mixture_logprobs(student: Tensor, teacher: Tensor, share: float | Tensor) -> Tensor:
    """log(share * p + (1 - share) * q), p the teacher: the law of teacher-mixed sampling; MiniLLM, arXiv 2306.08543.

    ``student`` and ``teacher`` are log-probabilities of one shape; ``share`` lies in [0, 1] and broadcasts against them, e.g.
    ``[B, 1]`` against ``[B, T]``. Formed by log-add-exp, so nothing underflows; exact at 0 and 1; an entry that is -inf in both
    stays -inf, and every gradient is finite.
    """
    student, teacher = promote(student), promote(teacher)
    weight = torch.as_tensor(share, dtype=student.dtype, device=student.device)
    # logaddexp(-inf, -inf) has a NaN gradient; a floor whose exponential is 0 changes no value.
    floor = torch.finfo(student.dtype).min / 4
    mixed = torch.logaddexp((student + torch.log1p(-weight)).clamp(min=floor), (teacher + weight.log()).clamp(min=floor))
    return mixed.masked_fill(mixed <= floor, -torch.inf)


def masked_sum(values: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Sum of the entries where ``mask`` is True; whatever stands elsewhere, NaN included, counts for nothing."""
    return torch.where(mask, values, 0.0).sum(dim)


def returns_to_go(rewards_BT: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """R_t = sum_{k >= 0} discount^k r_{t+k} over valid positions, the reward at t included; ``[B, T] -> [B, T]``, 0 at padding.

    A window that doubles each round gives all T sums in log2(T) steps, and rounds like a pairwise sum.
    """
    returns = torch.where(mask, rewards_BT, 0.0)
    window = 1
    while window < returns.shape[-1]:
        later = torch.nn.functional.pad(returns[..., window:], (0, window))
        returns = returns + discount**window * later
        window *= 2
    return torch.where(mask, returns, 0.0)


def future_returns(rewards_BT: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """R_{t+1} = sum_{k >= 0} discount^k r_{t+1+k}: what comes strictly after t; 0 at the last token; ``[B, T] -> [B, T]``."""
    shifted = torch.nn.functional.pad(returns_to_go(rewards_BT, mask, discount)[..., 1:], (0, 1))
    return torch.where(mask, shifted, 0.0) if rewards_BT.shape[-1] else rewards_BT


def remaining_tokens(mask: Tensor, include_current: bool) -> Tensor:
    """Number of valid tokens after t, or from t on when ``include_current``; ``[B, T] bool -> [B, T] int64``."""
    count = mask.long()
    from_here = count.flip(-1).cumsum(-1).flip(-1)
    return from_here if include_current else from_here - count
