"""OPD: by hand, its expected gradient by enumeration, and what every algorithm must keep."""

import itertools
import math

import pytest
import torch
from algorithm_cases import (
    Case,
    check_micro_batches,
    check_nothing_to_learn,
    evaluate,
    hand_case,
    loss_and_gradient,
    make_case,
    random_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.algorithms import OPD, Needs, Progress
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


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=2, max_size=5), seed=st.integers(0, 99), cut=st.integers(0, 5))
def test_any_split_into_micro_batches_sums_to_the_whole(lengths: list[int], seed: int, cut: int) -> None:
    rows = list(range(len(lengths)))
    for algorithm in (OPD(), OPD(clip=0.2, discount=0.9)):
        check_micro_batches(algorithm, random_case(lengths, seed=seed, share=0.0), [rows[cut:], rows[:cut]])


def test_nothing_to_learn_gives_zero() -> None:
    check_nothing_to_learn(OPD())


def test_another_teacher_moves_the_gradient_at_real_tokens_only() -> None:
    case = random_case([3, 2], share=0.0)
    teachers = [(2 * case.logits).log_softmax(-1), (-2 * case.logits).log_softmax(-1)]
    old, tokens = case.logits, case.batch.tokens
    first, second = (
        loss_and_gradient(OPD(), Case(old, teacher, make_case(old, old, teacher, tokens, [3, 2], 0.0).batch))[1]
        for teacher in teachers
    )
    assert torch.equal((first - second).abs().amax(-1) > 1e-4, case.batch.mask)


def test_the_student_writes_and_the_teacher_sends_one_number_a_token() -> None:
    assert OPD().mixture(Progress(step=0, steps=1)).writers == {Source.STUDENT}
    assert OPD().needs is Needs.SAMPLED
