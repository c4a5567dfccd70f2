"""KD, ImitKD and GKD: hand-worked values, golden numbers, rewards and importance weights."""

import math
from dataclasses import replace

import pytest
import torch
from algorithm_cases import (
    Case,
    evaluate,
    hand_case,
    loss_and_gradient,
    make_case,
    random_case,
)
from pydantic import ValidationError

from raykd.algorithms import GKD, KD, ImitKD, Progress
from raykd.algorithms.base import Mixture, Reduction
from raykd.algorithms.token_divergences import (
    JSD,
    AdaptiveKL,
    AlphaBeta,
    AnyDivergence,
    ForwardKL,
    Jeffreys,
    OfDistributions,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TopK,
    TotalVariation,
)
from raykd.logprobs import gather
from raykd.records import Source

START = Progress(step=0, steps=10)


def golden_case() -> Case:
    student = torch.tensor([[[0.2, 0.4, 0.1, 0.3]]], dtype=torch.float64).log()
    teacher = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]], dtype=torch.float64).log()
    return make_case(student, student, teacher, torch.tensor([[1]]), [1], share=0.0)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
def test_loss_by_hand(divergence: AnyDivergence) -> None:
    """Divergences of 1/4, 1/4, 1/4 and 27/16, 27/16 bits, in either direction, over 5 tokens or 2 responses."""
    token_sum = 3 / 4 + 27 / 8
    bits: dict[Reduction, float] = {
        "token_mean": token_sum / 5,
        "sequence_mean": (1 / 4 + 27 / 16) / 2,
        "sequence_sum": token_sum / 2,
    }
    for reduction, expected in bits.items():
        loss, metrics = evaluate(GKD(divergence=divergence, reduction=reduction), hand_case())
        assert loss.item() == pytest.approx(expected * math.log(2), abs=1e-12)
        assert metrics["divergence"].item() == pytest.approx(token_sum / 5 * math.log(2), abs=1e-12)
        assert metrics["nll"].item() == pytest.approx(11 / 5 * math.log(2), abs=1e-12)
        # FLAT has 9/4 bits of entropy, STEEP 15/8.
        assert metrics["entropy"].item() == pytest.approx((3 * 9 / 4 + 2 * 15 / 8) / 5 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("divergence", "value", "gradient"),
    [
        (ForwardKL(), 0.343073, (-0.3, 0.1, -0.05, 0.25)),
        (ReverseKL(), 0.428796, (-0.269017, -0.056446, -0.083426, 0.408889)),
        (JSD(beta=0.1), 0.030841, (-0.025769, 0.007891, -0.004697, 0.022575)),
        (JSD(beta=0.5), 0.088838, (-0.064049, 0.010531, -0.015201, 0.068718)),
        (JSD(beta=0.9), 0.036302, (-0.023284, -0.002197, -0.006814, 0.032295)),
        (SkewForwardKL(alpha=0.1), 0.277819, (-0.222126, 0.061433, -0.043982, 0.204676)),
        (SkewReverseKL(alpha=0.1), 0.309806, (-0.203951, 0.001230, -0.056331, 0.259053)),
        (AdaptiveKL(), 0.392057, (-0.282296, 0.010603, -0.069101, 0.340794)),
        (TotalVariation(), 0.35, (-0.14, 0.12, -0.07, 0.09)),
        (Jeffreys(), 0.771869, (-0.569017, 0.043554, -0.133426, 0.658889)),
        (AlphaBeta(), 0.466532, None),
    ],
)
def test_golden_loss_and_gradient(divergence: AnyDivergence, value: float, gradient: tuple[float, ...] | None) -> None:
    """By the formulas of arXiv 2306.13649 (KL, JSD), 2402.03898 (skew), 2404.02657 (AKL), 2505.04560 (alpha-beta)."""
    loss, got = loss_and_gradient(GKD(divergence=divergence), golden_case())
    assert loss.item() == pytest.approx(value, abs=1e-6)
    if gradient is not None:
        assert got.flatten().tolist() == pytest.approx(gradient, abs=1.5e-6)


def test_who_writes() -> None:
    assert (KD().mixture(START).dataset, KD().mixture(START).student) == (1, 0)
    assert (ImitKD().mixture(START).dataset, ImitKD().mixture(START).student) == (0.5, 0.5)
    assert (GKD().mixture(START).dataset, GKD().mixture(START).student) == (0, 1)
    assert GKD(student_share=0.3).mixture(START).dataset == pytest.approx(0.7)
    assert KD().divergence == ImitKD().divergence == ForwardKL()


def test_paper_averages_over_the_positions_of_a_response_first() -> None:
    assert GKD.paper().reduction == "sequence_mean"
    assert GKD.paper().divergence == GKD().divergence


def test_a_divergence_is_read_from_json_by_its_kind() -> None:
    algorithm = GKD.model_validate_json('{"divergence": {"kind": "jsd", "beta": 0.1}, "student_share": 0.5}')
    assert algorithm == GKD(divergence=JSD(beta=0.1), student_share=0.5)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_jsd_are_refused(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        JSD(beta=beta)


def test_the_coin_decides_for_whole_steps() -> None:
    algorithm = GKD.paper().model_copy(update={"student_share": 0.3})
    students = [algorithm.mixture(Progress(step=0, steps=1, coin=coin)).student for coin in (0.0, 0.29, 0.3, 0.99)]
    assert students == [1.0, 1.0, 0.0, 0.0]
    assert algorithm.writers == {Source.DATASET, Source.STUDENT}


def test_trl_samples_at_another_temperature_than_it_compares() -> None:
    algorithm = GKD.trl()
    assert (algorithm.reduction, algorithm.divergence) == ("token_mean", JSD(beta=0.5))
    mixtures = [algorithm.mixture(Progress(step=0, steps=1, coin=coin)) for coin in (0.49, 0.5)]
    assert [(mixture.student, mixture.temperature) for mixture in mixtures] == [(1.0, 0.9), (0.0, 0.9)]
    assert algorithm.temperature == GKD().sampling_temperature == 1


@pytest.mark.parametrize("other", [{"reward_weight": 0.5}, {"importance_limit": 2.0}])
def test_importance_ratios_and_another_sampling_temperature_are_refused(other: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="sampling_temperature"):
        GKD.model_validate({"sampling_temperature": 0.9} | other)


@pytest.mark.parametrize(("teacher", "teacher_share"), [(0.0, 0.2), (0.5, 0.0)])
def test_the_teacher_writes_at_temperature_one(teacher: float, teacher_share: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Mixture(temperature=0.9, student=1 - teacher, teacher=teacher, teacher_share=teacher_share)


def test_cross_entropy_beside_the_divergence_by_hand() -> None:
    """Half of 33/8 bits of forward KL and half of 11 bits of cross-entropy, over five tokens."""
    loss, _ = evaluate(KD(data_weight=0.5), hand_case())
    assert loss.item() == pytest.approx((33 / 16 + 11 / 2) / 5 * math.log(2), abs=1e-12)


def test_temperature_softens_both_distributions_in_the_loss() -> None:
    case = random_case([2, 1])
    cold = Case(case.logits / 2, (case.teacher / 2).log_softmax(-1), case.batch)
    softened, gradient = loss_and_gradient(GKD(divergence=ReverseKL(), temperature=2.0), case)
    plain, inner = loss_and_gradient(GKD(divergence=ReverseKL()), cold)
    torch.testing.assert_close(softened, plain)
    torch.testing.assert_close(gradient, inner / 2)


@pytest.mark.parametrize("of", [ReverseKL(), JSD(), SkewReverseKL(), Jeffreys()])
def test_top_k_without_the_tail_is_refused_where_leaking_mass_would_pay(of: OfDistributions) -> None:
    assert TopK(k=4, of=of).tail
    with pytest.raises(ValidationError, match="tail"):
        TopK(k=4, of=of, tail=False)


def test_top_k_of_adaptive_kl_is_refused() -> None:
    """All other tokens, taken for one, could be its head."""
    with pytest.raises(ValidationError, match="adaptive_kl"):
        TopK.model_validate({"of": {"kind": "adaptive_kl"}})


REWARDS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
"""Of the responses 00, 01, 10, 11."""


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_the_expected_gradient_of_the_reward_is_exact(reduction: Reduction) -> None:
    """Over all pairs of responses, each the other's baseline: r times the gradient of -E[reward], D left out by r = 1."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    leaf, responses = logits.clone().requires_grad_(), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    rows = torch.stack([torch.zeros(4, dtype=torch.int64), 1 + responses[:, 0]], 1)
    q = gather(leaf.log_softmax(-1)[rows], responses).sum(-1)
    algorithm = GKD(reward_weight=1.0, reduction=reduction)
    total = torch.zeros(())
    for one in range(4):
        for other in range(4):
            pair = [one, other]
            case = make_case(leaf[rows[pair]], logits[rows[pair]], logits[rows[pair]], responses[pair], [2, 2], share=0.0)
            case = Case(case.logits, case.teacher.log_softmax(-1), replace(case.batch, rewards=REWARDS[pair]))
            total = total + q[pair].sum().detach().exp() * evaluate(algorithm, case)[0]
    got, expected = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (total, -(q.exp() * REWARDS).sum()))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_reward_and_divergence_are_weighed() -> None:
    case = random_case([3, 2], share=0.0)
    _, mixed = loss_and_gradient(GKD(reward_weight=0.3), case)
    _, reward = loss_and_gradient(GKD(reward_weight=1.0), case)
    _, divergence = loss_and_gradient(GKD(), case)
    torch.testing.assert_close(mixed, 0.3 * reward + 0.7 * divergence)
    losses = [evaluate(GKD(reward_weight=weight), case)[0] for weight in (0.3, 1.0, 0.0)]
    torch.testing.assert_close(losses[0], 0.3 * losses[1] + 0.7 * losses[2])
    with pytest.raises(ValidationError, match="student_share"):
        GKD(reward_weight=0.3, student_share=0.5)


def test_truncated_importance_weights_by_hand() -> None:
    """Student text counts min(q / q_old, limit) of its divergence, other text all of it; the weight carries no gradient."""
    case = random_case([2, 2], share=0.0, drift=1.0)
    algorithm = GKD(divergence=ForwardKL(), importance_limit=1.2)
    _, gradient = loss_and_gradient(algorithm, case)
    student, tokens = case.logits.log_softmax(-1), case.batch.tokens
    weight = (gather(student, tokens) - case.batch.behaviour_logprobs).exp().clamp(max=1.2)
    weight[1] = 1.0
    assert (weight[0] != 1).all()
    torch.testing.assert_close(gradient, weight[..., None] * (student.exp() - case.teacher.exp()) / 4)
