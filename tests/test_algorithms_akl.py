"""AKL: hand-worked values under both boundary rules, golden numbers, and weights that carry no gradient."""

import math

import pytest
import torch
from algorithm_cases import (
    ANY,
    FLAT,
    STEEP,
    Case,
    evaluate,
    loss_and_gradient,
    make_case,
    random_case,
)
from pydantic import ValidationError

from raykd.algorithms import AKL, Progress
from raykd.algorithms.base import Reduction
from raykd.divergences import Boundary, forward_kl, reverse_kl

START = Progress(step=0, steps=10)
PEAKED = (1 / 8, 1 / 8, 1 / 8, 1 / 2, 1 / 8)


def hand_worked_case() -> Case:
    """2 responses of 3 and 2 tokens over 5 tokens: teacher STEEP and student ANY, then teacher FLAT and student PEAKED.

    KL(STEEP || ANY) = 19/16 bits, KL(ANY || STEEP) = 14/16, gaps |p - q| = (7, 4, 1, 3, 1)/16.
    KL(FLAT || PEAKED) = 1/2 bit, KL(PEAKED || FLAT) = 5/8, gaps (2, 2, 2, 6, 0)/16: the three that tie in FLAT have one gap.
    """
    student = torch.tensor([[ANY, ANY, ANY], [PEAKED, PEAKED, ANY]], dtype=torch.float64).log()
    teacher = torch.tensor([[STEEP, STEEP, STEEP], [FLAT, FLAT, STEEP]], dtype=torch.float64).log()
    return make_case(student, student, teacher, torch.tensor([[1, 1, 3], [3, 0, 2]]), [3, 2], share=0.0)


@pytest.mark.parametrize(
    ("boundary", "head_mass", "steep", "flat"),
    [
        # Mass 1/2 is reached exactly: heads of one token (7/16 of the gaps) and of two (1/3), by either rule.
        ("minimal", 0.5, (7 * 19 + 9 * 14) / 256, (1 / 3) * (1 / 2) + (2 / 3) * (5 / 8)),
        ("prefix", 0.5, (7 * 19 + 9 * 14) / 256, (1 / 3) * (1 / 2) + (2 / 3) * (5 / 8)),
        # 0.6 is crossed by the second and by the third token: in the head (11/16 and 1/2), or not.
        ("minimal", 0.6, (11 * 19 + 5 * 14) / 256, (1 / 2) * (1 / 2) + (1 / 2) * (5 / 8)),
        ("prefix", 0.6, (7 * 19 + 9 * 14) / 256, (1 / 3) * (1 / 2) + (2 / 3) * (5 / 8)),
    ],
)
def test_loss_by_hand(boundary: Boundary, head_mass: float, steep: float, flat: float) -> None:
    token_sum = 3 * steep + 2 * flat
    bits: dict[Reduction, float] = {
        "token_mean": token_sum / 5,
        "sequence_mean": (steep + flat) / 2,
        "sequence_sum": token_sum / 2,
    }
    for reduction, expected in bits.items():
        loss, metrics = evaluate(AKL(boundary=boundary, head_mass=head_mass, reduction=reduction), hand_worked_case())
        assert loss.item() == pytest.approx(expected * math.log(2), abs=1e-12)
        assert metrics["divergence"].item() == pytest.approx(token_sum / 5 * math.log(2), abs=1e-12)
        # The student gave the written tokens 1, 1, 2 and 1, 3 bits.
        assert metrics["nll"].item() == pytest.approx(8 / 5 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("teacher", "student", "boundary", "value", "gradient"),
    [
        ((0.4, 0.3, 0.2, 0.1), (0.1, 0.5, 0.3, 0.1), "prefix", 0.279300, (-0.231236, 0.168101, 0.075056, -0.011921)),
        ((0.4, 0.3, 0.2, 0.1), (0.1, 0.5, 0.3, 0.1), "minimal", 0.306551, (-0.277079, 0.189367, 0.091685, -0.003974)),
        ((0.5, 0.3, 0.15, 0.05), (0.2, 0.4, 0.1, 0.3), "prefix", 0.392057, (-0.282296, 0.010603, -0.069101, 0.340794)),
        ((0.5, 0.3, 0.15, 0.05), (0.2, 0.4, 0.1, 0.3), "minimal", 0.392057, (-0.282296, 0.010603, -0.069101, 0.340794)),
    ],
)
def test_golden_loss_and_gradient(
    teacher: tuple[float, ...], student: tuple[float, ...], boundary: Boundary, value: float, gradient: tuple[float, ...]
) -> None:
    """The definition of arXiv 2404.02657 on four tokens; ``prefix`` as wutaiqiang/LLM_KD_AKL at ff278be has it."""
    q, p = (torch.tensor([[probabilities]], dtype=torch.float64).log() for probabilities in (student, teacher))
    loss, got = loss_and_gradient(AKL(boundary=boundary), make_case(q, q, p, torch.tensor([[1]]), [1], share=0.0))
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert got.flatten().tolist() == pytest.approx(gradient, abs=1.5e-6)


def test_the_weights_carry_no_gradient() -> None:
    """The gradient is w grad KL(p || q) + (1 - w) grad KL(q || p), with the w that the value itself shows."""
    case = random_case([1], vocab=7, seed=3)
    logits = case.logits.clone().requires_grad_()
    q = logits.log_softmax(-1)
    forward, reverse = forward_kl(q, case.teacher).sum(), reverse_kl(q, case.teacher).sum()
    loss, gradient = loss_and_gradient(AKL(), case)
    weight = ((loss - reverse) / (forward - reverse)).item()
    parts = [torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (forward, reverse)]
    assert 0.05 < weight < 0.95
    torch.testing.assert_close(gradient, weight * parts[0] + (1 - weight) * parts[1])


def test_the_data_set_writes_unless_asked_otherwise() -> None:
    assert (AKL().mixture(START).dataset, AKL().mixture(START).student) == (1, 0)
    mixture = AKL(student_share=0.75).mixture(START)
    assert (mixture.dataset, mixture.student, mixture.teacher_share) == (0.25, 0.75, 0)
    assert (AKL().head_mass, AKL().boundary) == (0.5, "minimal")


@pytest.mark.parametrize(
    "wrong", [{"head_mass": 0}, {"head_mass": 1}, {"boundary": "maximal"}, {"student_share": 2}, {"mu": 0.5}]
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AKL.model_validate(wrong)
