"""DistiLLM-2: its two terms by hand, its curriculum and schedule, which must move."""

import math
from dataclasses import replace

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
    recorded_rows,
    two_sided,
)

from raykd.algorithms import DistiLLM2, Progress
from raykd.divergences import skew_forward_kl, skew_reverse_kl
from raykd.records import Source, Totals

BESIDE_STEEP = (8 / 48, 12 / 48, 14 / 48, 7 / 48, 7 / 48)
BESIDE_ANY = (15 / 48, 8 / 48, 15 / 48, 4 / 48, 6 / 48)
"""1/4 STEEP + 3/4 BESIDE_STEEP and 1/4 ANY + 3/4 BESIDE_ANY are both FLAT."""
PLAIN = DistiLLM2(alpha_curriculum=False, beta_schedule="constant")


def at(step: int, steps: int = 12) -> Progress:
    return Progress(step=step, steps=steps)


def test_loss_by_hand() -> None:
    """Student text of 3 tokens with SRKL 1/4 bit each, teacher text of 2 with SKL 1/2 bit each, alpha 1/4."""
    student = torch.tensor([[STEEP] * 3, [BESIDE_ANY, BESIDE_ANY, FLAT]], dtype=torch.float64).log()
    teacher = torch.tensor([[BESIDE_STEEP] * 3, [ANY, ANY, FLAT]], dtype=torch.float64).log()
    case = two_sided(make_case(student, student, teacher, torch.tensor([[0, 1, 2], [0, 4, 3]]), [3, 2], share=0.0))
    for beta, bits in ((0.5, 0.5 * 0.25 + 0.5 * 0.5), (0.25, 0.25 * 0.25 + 0.75 * 0.5), (1.0, 0.25)):
        loss, metrics = evaluate(PLAIN.model_copy(update={"alpha_max": 0.25, "beta": beta}), case)
        assert loss.item() == pytest.approx(bits / 2 * math.log(2), abs=1e-12)
        assert metrics["divergence"].item() == pytest.approx((3 * 0.25 + 2 * 0.5) / 5 * math.log(2), abs=1e-12)


def test_each_divergence_is_used_on_its_own_text_alone() -> None:
    case = random_case([3, 2])
    student, mask = case.logits.log_softmax(-1), case.batch.mask
    expected = torch.stack(
        [
            (skew_reverse_kl(student[0], case.teacher[0], 0.1) * mask[0]).sum() / 3,
            (skew_forward_kl(student[1], case.teacher[1], 0.1) * mask[1]).sum() / 2,
        ]
    )
    torch.testing.assert_close(evaluate(PLAIN, case)[0], expected.sum() / 2 * 0.5)
    code = evaluate(DistiLLM2.code(), case)[0]
    torch.testing.assert_close(code, expected.sum())


def test_the_public_code_detaches_the_mixture() -> None:
    """Golden: the SRKL gradient of arXiv 2402.03898 with and without the mixture's part, on one token of student text."""
    student = torch.tensor([[[0.2, 0.4, 0.1, 0.3]]], dtype=torch.float64).log()
    teacher = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]], dtype=torch.float64).log()
    case = make_case(student, student, teacher, torch.tensor([[1]]), [1], share=0.0)
    whole = (-0.203951, 0.001230, -0.056331, 0.259053)
    detached = (-0.232844, -0.021965, -0.068137, 0.322947)
    for algorithm, scale, expected in ((PLAIN, 0.5, whole), (DistiLLM2.code(), 2.0, detached)):
        loss, gradient = loss_and_gradient(algorithm, case)
        assert loss.item() / scale == pytest.approx(0.309806, abs=1e-6)
        assert [g / scale for g in gradient.flatten().tolist()] == pytest.approx(expected, abs=1.5e-6)


def test_beta_by_hand() -> None:
    """12 steps in 3 epochs of 4: 1/3 + 0, 1/4, 1/2, 3/4 of the first epoch, then the second; clipped to [0.5, 1]."""
    paper = [DistiLLM2().beta_at(at(step)) for step in range(6)]
    assert paper == pytest.approx([0.5, 1 / 3 + 1 / 4, 1 / 3 + 1 / 2, 1.0, 2 / 3, 2 / 3 + 1 / 4])
    ramp = [DistiLLM2(beta_schedule="ramp").beta_at(at(step)) for step in (0, 3, 6, 11)]
    assert ramp == pytest.approx([0.5, 0.625, 0.75, 0.75])
    assert {PLAIN.beta_at(at(step)) for step in range(12)} == {0.5}


def curriculum_case() -> Case:
    """One token a response. Teacher's text: p = 0.8, q = 0.4 and p = 0.5, q = 0.3; student's text the other way round."""
    pairs = torch.tensor([[0.4, 0.8], [0.8, 0.4], [0.3, 0.5], [0.5, 0.3]], dtype=torch.float64)
    p, q = pairs[:, :1], pairs[:, 1:]
    case = random_case([1, 1, 1, 1])
    return replace(case, batch=replace(case.batch, student_logprobs=q.log(), teacher_logprobs=p.log()))


def test_alpha_by_hand() -> None:
    """Mean gap 0.3 on both sides: 1 - 0.9 * 0.3 / 0.4 = 0.325 is cut to 0.1, 1 - 0.9 * 0.3 / 0.2 = -0.35 to 0.01."""
    algorithm, case = DistiLLM2(), curriculum_case()
    rows = recorded_rows(case.batch)
    numbers = algorithm.per_step(at(4), rows)
    assert numbers["gap/student"] == pytest.approx(0.3) and numbers["gap/teacher"] == pytest.approx(0.3)
    assert [algorithm.per_step(at(step), rows)["alpha_curriculum"] for step in (0, 3, 4, 11)] == [0, 0, 1, 1]
    batch = replace(case.batch, totals=Totals(tokens=4, sequences=4, numbers=numbers))
    assert algorithm.per_sequence(batch)["alpha"][:, 0].tolist() == pytest.approx([0.1, 0.1, 0.01, 0.01])
    wide = DistiLLM2(alpha_max=0.5, alpha_min=0.001)  # 1 - 0.5 * 0.75 and 1 - 0.5 * 1.5
    assert wide.per_sequence(batch)["alpha"][:, 0].tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25])


def test_the_likelihood_of_a_response_is_the_geometric_mean_of_its_tokens() -> None:
    """Two tokens of 0.5 and 0.3 have the gap of one, 0.2; beside a mean gap of 0.3 alpha is 1 - 0.5 * 1.5."""
    case = random_case([2, 1])
    writer, other = torch.full((2, 2), 0.5, dtype=torch.float64).log(), torch.full((2, 2), 0.3, dtype=torch.float64).log()
    student, teacher = torch.stack([writer[0], other[1]]), torch.stack([other[0], writer[1]])
    case = replace(case, batch=replace(case.batch, student_logprobs=student, teacher_logprobs=teacher))
    numbers = DistiLLM2().per_step(at(4), recorded_rows(case.batch))
    assert numbers["gap/student"] == pytest.approx(0.2) and numbers["gap/teacher"] == pytest.approx(0.2)
    batch = replace(case.batch, totals=Totals(tokens=3, sequences=2, numbers=numbers | {"gap/student": 0.3, "gap/teacher": 0.3}))
    alphas = DistiLLM2(alpha_max=0.5, alpha_min=0.001).per_sequence(batch)["alpha"][:, 0]
    assert alphas.tolist() == pytest.approx([0.25, 0.25])


def test_both_schedules_of_the_paper_move_the_loss() -> None:
    """The public code's never do; here the same batch costs something else at every stage of the training."""
    case = curriculum_case()
    losses = []
    for step in (0, 1, 4):
        numbers = DistiLLM2.paper().per_step(at(step), recorded_rows(case.batch))
        batch = replace(case.batch, totals=replace(case.batch.totals, numbers=numbers))
        losses.append(round(evaluate(DistiLLM2.paper(), replace(case, batch=batch))[0].item(), 9))
    assert len(set(losses)) == 3


def test_teacher_and_student_answer_the_same_prompts() -> None:
    mixture = DistiLLM2().mixture(at(0))
    assert (mixture.student, mixture.teacher, mixture.same_prompts) == (0.5, 0.5, True)
    assert DistiLLM2().writers == {Source.STUDENT, Source.TEACHER}
