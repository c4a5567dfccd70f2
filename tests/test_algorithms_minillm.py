"""MiniLLM: its expected gradient by enumeration of all responses, golden numbers, and what every option changes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from algorithm_cases import (
    Case,
    counted,
    evaluate,
    hand_case,
    loss_and_gradient,
    make_case,
    random_case,
    response_mask,
)
from pydantic import ValidationError
from torch import Tensor

from raykd.algorithms import KD, SFT, MiniLLM, Progress
from raykd.algorithms.base import TextTerm
from raykd.logprobs import gather
from raykd.records import Batch, Totals

VOCAB, LENGTH = 3, 3
EVERY_RESPONSE = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
PREFIX_ROWS = torch.stack(
    [torch.zeros(27, dtype=torch.int64), 1 + EVERY_RESPONSE[:, 0], 4 + 3 * EVERY_RESPONSE[:, 0] + EVERY_RESPONSE[:, 1]], 1
)
"""[27, 3]: which row of a table [13, V], one row a prefix, predicts each token of each response."""

PLAIN = MiniLLM(teacher_share=0.0, clip=None, length_normalise=False, reduction="sequence_sum")


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """Student logits and teacher log-probs for every prefix; [13, V]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(13, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher.log_softmax(-1)


def sequence_logprob(logprobs: Tensor) -> Tensor:
    """log-probability of each of the 27 responses under a table of log-probs; [27]."""
    return gather(logprobs[PREFIX_ROWS], EVERY_RESPONSE).sum(-1)


def exact_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """d/d student of sum_y q(y) (log q(y) - log p(y))."""
    leaf = student.clone().requires_grad_()
    q = sequence_logprob(leaf.log_softmax(-1))
    return torch.autograd.grad((q.exp() * (q - sequence_logprob(teacher))).sum(), leaf)[0]


def expected_gradient(algorithm: MiniLLM, student: Tensor, teacher: Tensor) -> Tensor:
    """sum_y q(y) d/d student loss(y), each response a step of its own."""
    leaf = student.clone().requires_grad_()
    weights = sequence_logprob(student.log_softmax(-1)).exp()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    total = torch.zeros((), dtype=torch.float64)
    for rows, tokens, weight in zip(PREFIX_ROWS[:, None], EVERY_RESPONSE[:, None], weights, strict=True):
        case = make_case(leaf[rows], student[rows], teacher[rows], tokens, [LENGTH], share=0.0)
        total = total + weight * evaluate(algorithm, case)[0]
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "algorithm",
    [PLAIN, PLAIN.model_copy(update={"single_step": False, "include_current_reward": True})],
    ids=["exact term and future returns", "returns alone"],
)
def test_expected_gradient_is_that_of_the_sequence_level_reverse_kl(algorithm: MiniLLM, seed: int) -> None:
    student, teacher = tables(seed)
    torch.testing.assert_close(
        expected_gradient(algorithm, student, teacher), exact_gradient(student, teacher), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    "change",
    [
        {"include_current_reward": True},
        {"single_step": False},
        {"discount": 0.9},
        {"length_normalise": True},
        {"reward_scale": 0.5},
    ],
)
def test_each_shortcut_changes_the_expected_gradient(change: dict[str, object]) -> None:
    """Counting r_t twice, leaving a term out, discounting, normalising and scaling are other objectives, not other estimators."""
    student, teacher = tables(0)
    got = expected_gradient(PLAIN.model_copy(update=change), student, teacher)
    assert (got - exact_gradient(student, teacher)).abs().max().item() > 1e-3


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_importance_weights_undo_the_teacher_mixture(share: float) -> None:
    """One token drawn from mu = share p + (1 - share) q_old by a student that has moved since: still the exact gradient."""
    old, teacher = (table[:1] for table in tables(2))
    leaf = (old + torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)).requires_grad_()
    mixed = share * teacher.exp() + (1 - share) * old.softmax(-1)
    algorithm = PLAIN.model_copy(update={"teacher_share": share, "single_step": False, "include_current_reward": True})
    total = torch.zeros((), dtype=torch.float64)
    for token in range(VOCAB):
        case = make_case(leaf[None], old[None], teacher[None], torch.tensor([[token]]), [1], share)
        total = total + mixed[0, token] * evaluate(algorithm, case)[0]
    got = torch.autograd.grad(total, leaf)[0]
    probability = leaf.softmax(-1)
    reward = teacher - old.log_softmax(-1)
    expected = torch.autograd.grad(-(probability * reward).sum(), leaf)[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_under_a_mixture_the_single_token_ratio_corrects_the_token_and_leaves_prefix_and_future_to_the_mixture() -> None:
    """The stated approximation, by enumeration of 3-token responses drawn from mu = a p + (1 - a) q:

    sum_t E_{prefix ~ mu} [ grad KL(q_t || p_t) - sum_v grad q_t(v) E_{future ~ mu}[R_{t+1} | prefix, v] ]
    """
    student, teacher = tables(3)
    share, leaf = 0.4, student.clone().requires_grad_()
    q_log, p_log = leaf.log_softmax(-1), teacher
    mu = share * teacher.exp() + (1 - share) * student.softmax(-1)
    weights = gather(mu[PREFIX_ROWS], EVERY_RESPONSE).prod(-1)
    algorithm = PLAIN.model_copy(update={"teacher_share": share})
    got, expected = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows, tokens, weight in zip(PREFIX_ROWS, EVERY_RESPONSE, weights, strict=True):
        case = make_case(leaf[rows[None]], student[rows[None]], teacher[rows[None]], tokens[None], [LENGTH], share=share)
        got = got + weight * evaluate(algorithm, case)[0]
        rewards = gather(p_log[rows] - student.log_softmax(-1)[rows], tokens)
        token_weights = gather(mu[rows], tokens)
        for t in range(LENGTH):
            exact = (q_log[rows[t]].exp() * (q_log[rows[t]] - p_log[rows[t]])).sum()
            # weight / mu(token t) leaves the mixture's law of prefix and future; q(token t) takes its place.
            returned = q_log[rows[t], tokens[t]].exp() / token_weights[t] * rewards[t + 1 :].sum()
            expected = expected + weight * (exact - returned)
    got, expected = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (got, expected))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    # It is an approximation: the sequence-level gradient has the running product of the ratios instead.
    assert (got - exact_gradient(student, teacher)).abs().max().item() > 1e-3


def test_loss_by_hand() -> None:
    """In bits: rewards 1, 0, -1 and -3, 3, their future means -1/2, -1, 0 and 3, 0; reverse KL 1/4 and 27/16; rho = 1."""
    algorithm = MiniLLM(teacher_share=0.0)
    loss, metrics = evaluate(algorithm, hand_case())
    bits = {
        "policy_loss": -1.5 / 5,
        "reverse_kl": (3 / 4 + 27 / 8) / 5,
        "sampled_reverse_kl": 0.0,
        "advantage": 1.5 / 5,
        "entropy": (3 * 9 / 4 + 2 * 15 / 8) / 5,
        "nll": 11 / 5,
    }
    assert loss.item() == pytest.approx((-1.5 + 3 / 4 + 27 / 8) / 5 * math.log(2), abs=1e-12)
    for name, expected in bits.items():
        assert metrics.pop(name).item() == pytest.approx(expected * math.log(2), abs=1e-12), name
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"importance_weight": 1.0, "importance_weight_squared": 1.0, "clip_fraction": 0.0}
    )


def golden_batch() -> Batch:
    """Rewards -1, -2, -3, -1/2 of the worked example for arXiv 2306.08543; log q_old and mixture weights of its surrogate."""
    old = torch.tensor([[-1.0, -2.0, -3.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([[1.25, 1.0, 0.1, 0.9]], dtype=torch.float64)
    return Batch(
        tokens=torch.zeros(1, 4, dtype=torch.int64),
        mask=torch.ones(1, 4, dtype=torch.bool),
        totals=Totals(tokens=4, sequences=1),
        student_logprobs=old,
        teacher_logprobs=old + torch.tensor([[-1.0, -2.0, -3.0, -0.5]], dtype=torch.float64),
        behaviour_logprobs=old - weights.log(),
        by_student=torch.ones(1, dtype=torch.bool),
        rewards=torch.zeros(1),
    )


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (MiniLLM(), (-1.833333, -1.75, -0.5, 0.0)),
        (MiniLLM.paper(), (-1.833333, -1.75, -0.5, 0.0)),
        (MiniLLM.lmops().model_copy(update={"reward_scale": 1.0}), (-1.509047, -1.767083, -1.7375, -0.5)),
        (MiniLLM.lmops(), (-3.018094, -3.534167, -3.475, -1.0)),
        (MiniLLM(length_normalise=False), (-5.5, -3.5, -0.5, 0.0)),
        (MiniLLM(reward_clip=1.5), (-3.5 / 3, -1.0, -0.5, 0.0)),
        (MiniLLM(reward_clip=3.0, reward_scale=0.5), (-7.0 / 3, -2.0, -1.0, 0.0)),
    ],
)
def test_golden_advantages(algorithm: MiniLLM, expected: tuple[float, ...]) -> None:
    """The paper's and microsoft/LMOps' returns of the same rewards."""
    batch = golden_batch()
    advantages = algorithm.advantages(batch.teacher_logprobs - batch.student_logprobs, batch.mask)
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_mean_of_later_rewards_stops_at_the_end_of_the_response() -> None:
    rewards = torch.tensor([[-1.0, -2.0, 9.0, 9.0], [9.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    assert MiniLLM().advantages(rewards, response_mask([2, 0, 4])).tolist() == [[-2, 0, 0, 0], [0, 0, 0, 0], [3, 3.5, 4, 0]]


def test_golden_surrogate() -> None:
    """microsoft/LMOps' returns and ratios: mean 2.669180 over four tokens; the middle two beyond the clip, without gradient."""
    new = torch.tensor([[-0.9, -2.3, -2.5, -1.0]], dtype=torch.float64, requires_grad=True)
    algorithm = MiniLLM.lmops().model_copy(update={"whiten": None, "single_step": False})
    given = {name: values[0] for name, values in algorithm.per_sequence(golden_batch()).items()}
    # Two tokens: the chosen one has log-prob new, so that its gradient is that of the surrogate.
    values = algorithm.per_token(new[0, :, None].expand(-1, 2), None, torch.zeros(4, dtype=torch.int64), given)
    values["loss"].mean().backward()
    assert values["loss"].mean().item() == pytest.approx(2.669180, abs=1e-6)
    assert values["clip_fraction"].tolist() == [0, 1, 1, 0]
    assert values["importance_weight"].tolist() == pytest.approx([1.381464, 0.740818, 0.164872, 0.9], abs=1e-6)
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([4.169387 / 4, 0, 0, 0.9 / 4], abs=1e-6)


def test_paper_weights_the_exact_term_by_the_ratio() -> None:
    case = random_case([3, 2], share=0.2)
    student = case.logits.log_softmax(-1)
    ratio = (gather(student, case.batch.tokens) - case.batch.behaviour_logprobs).exp()
    exact = (student.exp() * (student - case.teacher)).sum(-1)
    loss, metrics = evaluate(MiniLLM.paper(), case)
    policy = metrics["policy_loss"] * 5 / 2  # metrics are means over the five tokens, the loss is one over two responses
    torch.testing.assert_close(loss - policy, (ratio * exact * case.batch.mask).sum() / 2)
    loss, metrics = evaluate(MiniLLM(), case)
    torch.testing.assert_close(loss - metrics["policy_loss"], (exact * case.batch.mask).sum() / 5)


def test_the_weight_of_the_exact_term_carries_no_gradient() -> None:
    """The term alone, without rewards: each position's reverse-KL gradient q (log(q / p) - KL) times its ratio."""
    case = random_case([3, 2], share=0.2)
    unrewarded = replace(case.batch, teacher_logprobs=case.batch.student_logprobs)
    _, gradient = loss_and_gradient(MiniLLM.paper(), Case(case.logits, case.teacher, unrewarded))
    student = case.logits.log_softmax(-1)
    gap = student - case.teacher
    exact = student.exp() * (gap - (student.exp() * gap).sum(-1, keepdim=True))
    ratio = (gather(student, case.batch.tokens) - case.batch.behaviour_logprobs).exp() * case.batch.mask
    torch.testing.assert_close(gradient, exact * ratio[..., None] / 2)


def test_settings_of_the_loop() -> None:
    algorithm, start = MiniLLM(), Progress(step=0, steps=10)
    assert (algorithm.mixture(start).student, algorithm.mixture(start).teacher_share) == (1, 0.2)
    assert (algorithm.rollouts_per_phase, algorithm.inner_epochs, algorithm.text) == (256, 4, TextTerm(SFT(), 1.0))


def test_presets_differ_from_the_default_only_where_they_should() -> None:
    default = MiniLLM().model_dump()
    differing = {name: {k: v for k, v in preset.model_dump().items() if v != default[k]} for name, preset in PRESETS.items()}
    assert differing == {
        "paper": {"weight_single_step": True, "reduction": "sequence_sum"},
        "lmops": {
            "include_current_reward": True,
            "discount": 0.95,
            "reward_scale": 0.5,
            "reward_clip": 100.0,
            "whiten": 256,
            "text_distillation": 0.5,
        },
    }


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_plain_text_is_reduced_as_responses_are(share: float) -> None:
    """The paper prints -log q of a whole text beside sums over responses; the public code takes means over tokens of both."""
    for algorithm in (MiniLLM.paper(), MiniLLM(), MiniLLM.lmops()):
        text = algorithm.model_copy(update={"text_distillation": share}).text
        assert text is not None and text.algorithm.reduction == algorithm.reduction


PRESETS = {"paper": MiniLLM.paper(), "lmops": MiniLLM.lmops()}


@pytest.mark.parametrize("field", ["teacher_share", "clip", "reward_scale"])
def test_impossible_settings_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        MiniLLM.model_validate({field: 1.0 if field != "reward_scale" else 0.0})


def test_whitened_advantages_by_hand() -> None:
    """Advantages 3, 1 and -1 of two responses: over the tokens mean 1, variance 8/3; over 4 positions each 3/8 and 79/64."""
    rewards = {"include_current_reward": True, "discount": 0.0, "length_normalise": False}
    ratios = torch.tensor([[3.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros_like(ratios)
    batch = Batch(
        tokens=zeros.long(),
        mask=mask,
        totals=Totals(tokens=3, sequences=2),
        student_logprobs=zeros,
        teacher_logprobs=ratios,
        behaviour_logprobs=zeros,
        by_student=torch.ones(2, dtype=torch.bool),
        rewards=torch.zeros(2),
    )
    case = Case(torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), batch)
    for whiten, mean, variance in (("tokens", 1.0, 8 / 3), (4, 3 / 8, 11 / 8 - 9 / 64)):
        algorithm = MiniLLM.model_validate({"whiten": whiten, **rewards})
        advantage = algorithm.per_sequence(counted(algorithm, case).batch)["advantage"]
        expected = (ratios[mask] - mean) / math.sqrt(variance + 1e-8)
        torch.testing.assert_close(advantage[mask], expected)


def test_half_of_the_text_loss_may_be_the_teachers() -> None:
    assert MiniLLM.lmops().text == TextTerm(KD(data_weight=0.5), 1.0)
    assert MiniLLM(text_distillation=0.25).text == TextTerm(KD(data_weight=0.75), 1.0)
    assert MiniLLM(text_coefficient=0).text is None
