"""Divergences between next-token distributions: log-probabilities in, ``student`` first, ``[..., V] -> [...]``.

p is the teacher, q the student; natural logarithms. Values are true divergences (the entropy term is included): 0 when
p = q, else positive. Half-precision inputs are computed in float32, float64 stays float64. A probability of 0 (log-probability
-inf) contributes what the limit says: nothing where its own weight is 0, and +inf where the definition is infinite, so that a
broken pair is seen; gradients are finite in every case (an infinite value sends none). Reducing over tokens is not done here.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raykd.logprobs import all_finite, can_look, mixture_logprobs, promote

Boundary = Literal["minimal", "prefix"]

HEAD_CANDIDATES = 64
"""Tokens looked at before sorting the whole vocabulary: with head_mass 0.5 the head is a handful of tokens."""


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), mode covering; the word-level distillation of Hinton et al., arXiv 1503.02531.

    ``[..., V], [..., V] -> [...]``, range [0, inf]. Gradient to the student's logits: q - p.
    """
    student, teacher = _checked(student, teacher)
    return _kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v), mode seeking; MiniLLM, arXiv 2306.08543.

    ``[..., V], [..., V] -> [...]``, range [0, inf]. Gradient to the student's logits: q (log(q / p) - KL(q || p)).
    """
    student, teacher = _checked(student, teacher)
    return _kl(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; GKD, arXiv 2306.13649, eq. 1.

    ``[..., V], [..., V] -> [...]``, range [0, entropy of (beta, 1 - beta)]. JSD(beta) / beta -> forward KL as beta -> 0 and
    JSD(beta) / (1 - beta) -> reverse KL as beta -> 1, while JSD itself vanishes at both ends: they are refused.
    """
    if not 0 < beta < 1:
        raise ValueError(f"jensen_shannon: beta must be inside (0, 1), got {beta}; use forward_kl or reverse_kl for the ends")
    student, teacher = _checked(student, teacher)
    mixed = mixture_logprobs(student, teacher, beta)
    return beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float | Tensor) -> Tensor:
    """SKL(alpha) = KL(p || alpha p + (1 - alpha) q); DistiLLM, arXiv 2402.03898.

    ``[..., V], [..., V] -> [...]``, range [0, -log alpha]; one alpha, or one a token ``[...]``. alpha = 0 is forward KL,
    alpha = 1 gives 0.
    """
    share = _share_of_each("skew_forward_kl: alpha", alpha)
    student, teacher = _checked(student, teacher)
    return _kl(teacher, mixture_logprobs(student, teacher, share))


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float | Tensor, *, detach_mixture: bool = False) -> Tensor:
    """SRKL(alpha) = KL(q || (1 - alpha) p + alpha q); DistiLLM, arXiv 2402.03898.

    ``[..., V], [..., V] -> [...]``, range [0, -log alpha]; one alpha, or one a token ``[...]``. alpha = 0 is reverse KL,
    alpha = 1 gives 0. The mixture's gradient, -alpha q / m, is included unless ``detach_mixture``: DistiLLM-2's public code.
    """
    share = _share_of_each("skew_reverse_kl: alpha", alpha)
    student, teacher = _checked(student, teacher)
    return _kl(student, mixture_logprobs(student.detach() if detach_mixture else student, teacher, 1 - share))


def top_k(student: Tensor, teacher: Tensor, k: int, *, tail: bool = True) -> tuple[Tensor, Tensor]:
    """Student and teacher on the teacher's k most probable tokens and one event for all others; ``[..., V] -> [..., k + 1]``.

    A divergence of the two is a true divergence, with the mass outside in it. An f-divergence (KLs, JSD, their skewed forms,
    total variation) is never more than that of the whole vocabulary, by data processing; others may be, the alpha-beta
    divergence with alpha + beta = 2 sixty times as much. Without ``tail`` both are renormalised on the k tokens: ``[..., k]``,
    blind to what leaks out of them. A vocabulary of k tokens or fewer stays as it is. Gradients are finite.
    """
    if k < 1:
        raise ValueError(f"top_k: k must be at least 1, got {k}")
    student, teacher = _checked(student, teacher)
    if k >= student.shape[-1]:
        return student, teacher
    kept = teacher.topk(k).indices
    return tuple(_on_kept(logprobs, kept, tail) for logprobs in (student, teacher))  # pyright: ignore[reportReturnType]


def adaptive_kl(student: Tensor, teacher: Tensor, head_mass: float = 0.5, boundary: Boundary = "minimal") -> Tensor:
    """AKL = w KL(p || q) + (1 - w) KL(q || p), w the head's part of sum_v |p_v - q_v|; Wu et al., arXiv 2404.02657.

    The head is the teacher's most probable tokens: ``minimal`` the smallest set of mass >= ``head_mass``, ``prefix`` the longest
    prefix of mass <= ``head_mass`` (never empty; the official code). w carries no gradient and is 1/2 where p = q.
    ``[..., V], [..., V] -> [...]``, between the two KLs.
    """
    _check_share("adaptive_kl: head_mass", head_mass)
    if boundary not in ("minimal", "prefix"):
        raise ValueError(f"adaptive_kl: boundary must be 'minimal' or 'prefix', got {boundary!r}")
    student, teacher = _checked(student, teacher)
    weight = _head_weight(student.detach(), teacher.detach(), head_mass, boundary)
    return weight * _kl(teacher, student) + (1 - weight) * _kl(student, teacher)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """TV = 1/2 sum_v |p_v - q_v|; f-distill, Wen et al., ACL 2023. ``[..., V], [..., V] -> [...]``, range [0, 1]."""
    student, teacher = _checked(student, teacher)
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


def jeffreys(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p); Jeffreys 1946. ``[..., V], [..., V] -> [...]``, range [0, inf]."""
    student, teacher = _checked(student, teacher)
    return _kl(teacher, student) + _kl(student, teacher)


def alpha_beta(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """AB = -1/(a b) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]; Cichocki et al. 2011, ABKD, arXiv 2505.04560.

    At b = 0 the limit 1/a^2 sum_v [p^a log(p^a / q^a) - p^a + q^a], at a = 0 the same with p and q, a and b exchanged.
    (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) four times the squared Hellinger distance, (1, 1) half the squared
    Euclidean distance. Negative parameters, infinite at any zero, are refused. ``[..., V], [..., V] -> [...]``, range [0, inf].
    """
    if min(alpha, beta) < 0 or alpha + beta == 0:
        raise ValueError(f"alpha_beta: alpha and beta must be non-negative and not both 0, got {alpha} and {beta}")
    student, teacher = _checked(student, teacher)
    if alpha == 0 or beta == 0:
        first, second, power = (teacher, student, alpha) if beta == 0 else (student, teacher, beta)
        first, second = power * first, power * second
        return (_kl(first, second) - first.exp().sum(-1) + second.exp().sum(-1)) / power**2
    total = alpha + beta
    cross = (alpha * teacher + beta * student).exp()
    terms = cross - alpha / total * (total * teacher).exp() - beta / total * (total * student).exp()
    return -terms.sum(-1) / (alpha * beta)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """sum_v exp(first) (first - second), with 0 log 0 = 0; +inf, without a gradient, where only ``second`` has no mass."""
    return _KL.apply(first, second)[0]


class _KL(torch.autograd.Function):
    """By hand, since masks of ``[..., V]`` would take most of the time: -inf is a floor instead, whose exponential is 0."""

    @staticmethod
    def forward(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """The values, and what the gradient needs: probabilities, terms, and which values are infinite, empty for none."""
        probabilities = first.exp()
        if can_look(first):
            terms = (first - second).mul_(probabilities)
            if all_finite(values := terms.sum(-1)):
                return values, probabilities, terms, torch.zeros(0, dtype=torch.bool)
        floor = torch.finfo(first.dtype).min / 4
        terms = first.clamp(min=floor) - second.clamp(min=floor)
        impossible = terms.amax(-1) > -floor / 2
        terms *= probabilities
        return terms.sum(-1).masked_fill(impossible, math.inf), probabilities, terms, impossible

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros of ``[..., V]`` in the place of their gradients
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream[0] is None:
            return None, None
        probabilities, terms, impossible = ctx.saved_tensors
        slope = (upstream[0].masked_fill(impossible, 0.0) if impossible.numel() else upstream[0]).unsqueeze(-1)
        to_first = (terms + probabilities).mul_(slope) if ctx.needs_input_grad[0] else None
        return to_first, probabilities * -slope if ctx.needs_input_grad[1] else None


@torch.library.custom_op("raykd::head_weight", mutates_args=())
def _head_weight(student: Tensor, teacher: Tensor, head_mass: float, boundary: str) -> Tensor:
    """The head's part of sum_v |p_v - q_v|, 1/2 where that sum is 0; ``[...]``. An operator, since it looks at its numbers:
    compiled programs end where they would have to."""
    probabilities = teacher.exp()
    gaps = (probabilities - student.exp()).abs()
    size = min(HEAD_CANDIDATES, teacher.shape[-1])
    mass, order = probabilities.topk(size, dim=-1)
    if size < teacher.shape[-1] and bool((mass.sum(-1) <= head_mass).any()):
        mass, order = probabilities.sort(dim=-1, descending=True)
    up_to = mass.cumsum(-1)
    # A prefix whose mass is head_mass in exact arithmetic must not fall on either side by rounding.
    rounding = 8 * torch.finfo(mass.dtype).eps
    head = up_to - mass < head_mass - rounding if boundary == "minimal" else up_to <= head_mass + rounding
    head[..., 0] = True
    head_gap = (gaps.gather(-1, order) * head).sum(-1)
    tiny = torch.finfo(gaps.dtype).tiny
    return (head_gap + tiny) / (gaps.sum(-1) + 2 * tiny)


@_head_weight.register_fake
def _(student: Tensor, teacher: Tensor, head_mass: float, boundary: str) -> Tensor:
    return student.new_empty(student.shape[:-1])


def _checked(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher log-probabilities differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)};"
            " cut both vocabularies to the tokenizer's true size before the softmax"
        )
    return promote(student), promote(teacher)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be within [0, 1], got {value}")


def _share_of_each(name: str, value: float | Tensor) -> float | Tensor:
    """A share that broadcasts against ``[..., V]``."""
    if isinstance(value, Tensor):
        return value.unsqueeze(-1)
    _check_share(name, value)
    return value


def _on_kept(logprobs: Tensor, kept: Tensor, tail: bool) -> Tensor:
    """Log-probs of the kept tokens, then of all others together; or renormalised on the kept ones."""
    chosen = logprobs.gather(-1, kept)
    if not tail:
        return chosen.log_softmax(-1)
    # logsumexp of nothing but -inf has a NaN gradient; a floor whose exponential is 0 changes no value.
    floor = torch.finfo(logprobs.dtype).min / 4
    others = logprobs.clamp(min=floor).scatter(-1, kept, floor).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others.masked_fill(others <= floor / 2, -torch.inf)], -1)
