"""Policy-gradient surrogates on numbers worked by hand."""

import math

import pytest
import torch

from raykd.logprobs import mixture_logprobs
from raykd.surrogates import clipped_surrogate, importance_ratio, is_clipped, truncated_importance_weight


@pytest.mark.parametrize(("q", "p", "weight"), [(0.5, 0.1, 1.190476), (0.01, 0.9, 0.053191), (0.3, 0.3, 1.0)])
def test_weight_of_a_mixed_token(q: float, p: float, weight: float) -> None:
    """q / (0.2 p + 0.8 q), MiniLLM (arXiv 2306.08543) at teacher share 0.2."""
    student, teacher = torch.tensor(q, dtype=torch.float64).log(), torch.tensor(p, dtype=torch.float64).log()
    ratio = importance_ratio(student, mixture_logprobs(student, teacher, 0.2))
    assert ratio.item() == pytest.approx(weight, abs=1e-6)
    assert ratio.item() <= 1.25


def test_mean_weight_under_the_behaviour_law_is_one() -> None:
    student, teacher = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    behaviour = mixture_logprobs(student, teacher, 0.3)
    assert (behaviour.exp() * importance_ratio(student, behaviour)).sum().item() == pytest.approx(1, abs=1e-12)


def test_clipped_surrogate_of_the_minillm_example() -> None:
    """rho and values of the surrogate of arXiv 2306.08543 with clip 0.2; tokens 1 and 2 get no gradient."""
    advantages = torch.tensor([-3.018094, -3.534167, -3.475, -1.0], dtype=torch.float64)
    old = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=torch.float64)
    behaviour = old - torch.tensor([1.25, 1.0, 0.1, 0.9], dtype=torch.float64).log()
    new = torch.tensor([-0.9, -2.3, -2.5, -1.0], dtype=torch.float64, requires_grad=True)
    ratio = importance_ratio(new, behaviour)
    values = clipped_surrogate(ratio, advantages, 0.2)
    values.sum().backward()
    assert ratio.tolist() == pytest.approx([1.381464, 0.740818, 0.164872, 0.9], abs=1e-6)
    assert values.tolist() == pytest.approx([4.169387, 2.827333, 2.78, 0.9], abs=2e-6)
    assert values.mean().item() == pytest.approx(2.669180, abs=1e-6)
    assert is_clipped(ratio, advantages, 0.2).tolist() == [False, True, True, False]
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([4.169387, 0, 0, 0.9], abs=2e-6)


@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_is_clipped_says_where_the_gradient_vanishes(advantage: float) -> None:
    ratio = torch.linspace(0.05, 2.0, 40, dtype=torch.float64, requires_grad=True)
    advantages = torch.full_like(ratio, advantage)
    clipped_surrogate(ratio, advantages, 0.2).sum().backward()
    assert ratio.grad is not None
    flat = ratio.grad == 0
    assert torch.equal(is_clipped(ratio, advantages, 0.2), flat & (advantages != 0))


def test_without_clip_it_is_the_importance_weighted_policy_gradient() -> None:
    ratio, advantages = torch.tensor([0.1, 3.0]), torch.tensor([-1.0, 2.0])
    assert clipped_surrogate(ratio, advantages, None).tolist() == pytest.approx([0.1, -6.0])
    assert not is_clipped(ratio, advantages, None).any()


def test_truncated_weight_is_bounded_and_constant() -> None:
    new = torch.tensor([0.0, -1.0, -5.0], requires_grad=True)
    weight = truncated_importance_weight(new, torch.tensor([-3.0, -1.0, -4.0]), 2.0)
    assert weight.tolist() == pytest.approx([2.0, 1.0, math.exp(-1)])
    assert not weight.requires_grad
    with pytest.raises(ValueError, match="positive"):
        truncated_importance_weight(new, new, 0.0)
