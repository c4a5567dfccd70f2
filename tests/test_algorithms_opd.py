"""OPD: by hand, and its expected gradient by enumeration."""

import itertools
import math

import pytest
import torch
from algorithm_cases import (
    evaluate,
    hand_case,
    loss_and_gradient,
    make_case,
    random_case,
)

from raykd.algorithms import OPD, Progress
from raykd.divergences import reverse_kl
from raykd.logprobs import gather
from raykd.records import Source

VOCAB, LENGTH = 3, 2
EVERY_RESPONSE = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))


def test_loss_by_hand() -> None:
    """On-policy rho = 1: minus the mean of log p - log q, which is 1, 0, -1, -3, 3 bits; the discount adds the later ones."""
    for discount, bits in ((0.0, 0.0), (1.0, -(0 - 1 - 1 + 0 + 3))):
        loss, metrics = evaluate(OPD(discount=discount), hand_case())
        assert loss.item() == pytest.approx(bits / 5 * math.log(2), abs=1e-12)
        assert metrics["sampled_reverse_kl"].item() == pytest.approx(0.0, abs=1e-12)
        assert metrics["importance_weight"].item() == pytest.approx(1.0)


def test_the_coefficient_scales_the_advantage() -> None:
    plain, double = (
        loss_and_gradient(OPD(coefficient=coefficient), random_case([3, 2], share=0.0)) for coefficient in (1.0, 2.0)
    )
    torch.testing.assert_close(double, (2 * plain[0], 2 * plain[1]))


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_expected_gradient(discount: float) -> None:
    """Discount 0: every visited position's reverse KL, the visits held fixed; discount 1: the sequence-level reverse KL."""
    generator = torch.Generator().manual_seed(1)
    logits, teacher = (torch.randn(1 + VOCAB, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = teacher.log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    total, exact = torch.zeros(()), torch.zeros(())
    for response in EVERY_RESPONSE:
        rows = torch.tensor([[0, 1 + int(response[0])]])
        tokens = response[None]
        q = gather(leaf.log_softmax(-1)[rows], tokens).sum()
        case = make_case(leaf[rows], logits[rows], teacher[rows], tokens, [LENGTH], share=0.0)
        total = total + q.detach().exp() * evaluate(OPD(discount=discount, reduction="sequence_sum"), case)[0]
        if discount:
            exact = exact + q.exp() * (q - gather(teacher[rows], tokens).sum())
        else:
            exact = exact + q.detach().exp() * reverse_kl(leaf.log_softmax(-1)[rows], teacher[rows]).sum()
    got, expected = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (total, exact))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_the_student_writes() -> None:
    assert OPD().mixture(Progress(step=0, steps=1)).writers == {Source.STUDENT}
