"""Log-probabilities and masked sequences against plain Python loops and hand-worked numbers."""

import math

import pytest
import torch
from algorithm_cases import response_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raykd.logprobs import (
    entropy,
    future_returns,
    gather,
    log_softmax,
    masked_sum,
    mixture_logprobs,
    remaining_tokens,
    returns_to_go,
)


def loop_returns(rewards: list[float], discount: float) -> list[float]:
    returns, after = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        after = returns[t] = rewards[t] + discount * after
    return returns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_softmax_of_halves_is_the_float32_one(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 1000) * 3).to(dtype)
    assert log_softmax(logits).dtype == torch.float32
    assert torch.equal(log_softmax(logits), torch.log_softmax(logits.float(), -1))


def test_log_softmax_keeps_float64() -> None:
    assert log_softmax(torch.randn(3, 5, dtype=torch.float64)).dtype == torch.float64


def test_gather_picks_the_chosen_token() -> None:
    logprobs = torch.arange(24.0).view(2, 3, 4)
    tokens = torch.tensor([[0, 3, 1], [2, 2, 0]])
    assert gather(logprobs, tokens).tolist() == [[0, 7, 9], [14, 18, 20]]


def test_entropy_equals_torch_and_counts_zero_probabilities_as_zero() -> None:
    logits = torch.randn(7, 11, dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(log_softmax(logits)), expected)
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert entropy(half).item() == pytest.approx(math.log(2), abs=1e-15)


def test_masked_sum_ignores_even_nan_and_its_gradient() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 8.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sums = masked_sum(values, mask, dim=-1)
    assert sums.tolist() == [3, 4]
    sums.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1, 1, 0], [1, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=0, max_size=21), st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.integers(0, 4))
def test_returns_equal_a_loop_whatever_stands_in_the_padding(rewards: list[float], discount: float, padding: int) -> None:
    padded = torch.tensor([[*rewards, *[math.nan] * padding]], dtype=torch.float64).view(1, -1)
    mask = response_mask([len(rewards)]).new_zeros(1, padded.shape[1])
    mask[:, : len(rewards)] = True
    expected = loop_returns(rewards, discount)
    later = [*expected[1:], 0.0][: len(rewards)]
    zeros = [0.0] * padding
    assert returns_to_go(padded, mask, discount)[0].tolist() == pytest.approx([*expected, *zeros], abs=1e-12)
    assert future_returns(padded, mask, discount)[0].tolist() == pytest.approx([*later, *zeros], abs=1e-12)


def test_remaining_tokens_counts_with_and_without_the_current_one() -> None:
    mask = response_mask([3, 1])
    assert remaining_tokens(mask, include_current=True).tolist() == [[3, 2, 1], [1, 0, 0]]
    assert remaining_tokens(mask, include_current=False).tolist() == [[2, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_mixture_is_the_log_of_the_mixed_probabilities(share: float) -> None:
    student, teacher = log_softmax(torch.randn(2, 6, 9, dtype=torch.float64))
    expected = (share * teacher.exp() + (1 - share) * student.exp()).log()
    torch.testing.assert_close(mixture_logprobs(student, teacher, share), expected, atol=1e-12, rtol=0)


def test_mixture_is_exact_at_both_ends_and_per_row() -> None:
    student, teacher = log_softmax(torch.randn(2, 3, 5))
    shares = torch.tensor([[0.0], [1.0], [0.2]])
    mixed = mixture_logprobs(student, teacher, shares)
    assert torch.equal(mixed[0], student[0])
    assert torch.equal(mixed[1], teacher[1])
    torch.testing.assert_close(mixed[2].exp(), 0.2 * teacher[2].exp() + 0.8 * student[2].exp())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixture_keeps_impossible_tokens_impossible_with_finite_gradients(share: float) -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5, -math.inf]] * 2, requires_grad=True)
    teacher = log_softmax(torch.tensor([1.0, 2.0, -math.inf, -math.inf]))
    mixed = mixture_logprobs(log_softmax(logits), teacher, share)
    assert mixed[0, 3].item() == -math.inf
    assert torch.isfinite(mixed[:, 0]).all()
    assert mixed.exp().sum(-1).tolist() == pytest.approx([1, 1], abs=1e-6)
    gradient = grad_of_probabilities(mixed, logits)
    assert torch.isfinite(gradient).all()


def test_mixture_does_not_underflow() -> None:
    """A mixture formed in probability space is log 0 here, since exp(-200) is 0 in float32."""
    assert mixture_logprobs(torch.tensor(-200.0), torch.tensor(-201.0), 0.5).item() == pytest.approx(
        -200 + math.log(0.5 + 0.5 * math.exp(-1)), abs=1e-4
    )


def grad_of_probabilities(logprobs: Tensor, leaf: Tensor) -> Tensor:
    weights = torch.arange(logprobs.shape[-1], dtype=logprobs.dtype)
    return torch.autograd.grad((logprobs.exp() * weights).sum(), leaf)[0]
