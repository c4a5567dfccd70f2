"""SFT and SeqKD on hand-worked numbers, and what the reductions are."""

import math

import pytest
import torch
from algorithm_cases import evaluate, hand_case, loss_and_gradient, random_case

from raykd.algorithms import SFT, Progress, SeqKD
from raykd.algorithms.base import Reduction
from raykd.records import Source

START = Progress(step=0, steps=10)


def test_loss_by_hand() -> None:
    """Chosen probabilities 1/4, 1/4, 1/4 and 1/2, 1/16: 2 + 2 + 2 + 1 + 4 bits over 5 tokens or 2 responses."""
    bits: dict[Reduction, float] = {"token_mean": 11 / 5, "sequence_mean": (6 / 3 + 5 / 2) / 2, "sequence_sum": 11 / 2}
    for reduction, expected in bits.items():
        loss, metrics = evaluate(SFT(reduction=reduction), hand_case())
        assert loss.item() == pytest.approx(expected * math.log(2), abs=1e-12)
        assert metrics["nll"].item() == pytest.approx(11 / 5 * math.log(2), abs=1e-12)


def test_sequence_mean_divides_each_response_by_its_own_length() -> None:
    case = random_case([3, 1, 0])
    nll = -case.logits.log_softmax(-1).gather(-1, case.batch.tokens[..., None])[..., 0]
    loss, _ = evaluate(SFT(reduction="sequence_mean"), case)
    torch.testing.assert_close(loss, (nll[0].mean() + nll[1, 0]) / 3)


def test_gradient_is_probability_minus_choice() -> None:
    case = random_case([3, 1])
    _, gradient = loss_and_gradient(SFT(), case)
    expected = case.logits.softmax(-1) - torch.nn.functional.one_hot(case.batch.tokens, 5)
    torch.testing.assert_close(gradient, expected * case.batch.mask[..., None] / 4)


def test_loss_equals_cross_entropy_of_torch() -> None:
    case = random_case([4, 0, 2])
    mask = case.batch.mask
    expected = torch.nn.functional.cross_entropy(case.logits[mask], case.batch.tokens[mask])
    torch.testing.assert_close(loss_and_gradient(SFT(), case)[0], expected)


def test_sft_reads_the_data_set() -> None:
    assert SFT().mixture(START).dataset == 1
    assert (SFT().rollouts_per_phase, SFT().inner_epochs, SFT().text) == (None, 1, None)


def test_seq_kd_learns_what_the_teacher_writes() -> None:
    """The same loss as SFT; log p - log q of the chosen tokens is 1, 0, -1, -3, 3 bits."""
    case = hand_case()
    mixture = SeqKD().mixture(START)
    loss, metrics = evaluate(SeqKD(), case)
    assert (mixture.teacher, mixture.writers) == (1, {Source.TEACHER})
    assert loss.item() == evaluate(SFT(), case)[0].item()
    assert metrics["sampled_forward_kl"].item() == pytest.approx(0, abs=1e-12)
