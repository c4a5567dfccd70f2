"""DistiLLM: skew KLs by hand and golden, and its schedule against traces worked by hand."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from algorithm_cases import (
    ANY,
    STEEP,
    Case,
    evaluate,
    loss_and_gradient,
    make_case,
    random_case,
)
from pydantic import ValidationError

from raykd.algorithms import SFT, AdaptiveSchedule, AdaptiveState, DistiLLM, Mixture, Progress
from raykd.algorithms.base import Reduction, Replay, TextTerm
from raykd.algorithms.distillm import SkewKL
from raykd.algorithms.token_divergences import SkewForwardKL, SkewReverseKL
from raykd.records import Source

BOTH: list[SkewKL] = [SkewForwardKL(), SkewReverseKL()]
PAPER, CODE = AdaptiveSchedule(), AdaptiveSchedule.code()

# 1/4 STEEP + 3/4 BESIDE_STEEP and 1/4 ANY + 3/4 BESIDE_ANY are both FLAT of algorithm_cases.
BESIDE_STEEP = (8 / 48, 12 / 48, 14 / 48, 7 / 48, 7 / 48)
BESIDE_ANY = (15 / 48, 8 / 48, 15 / 48, 4 / 48, 6 / 48)


@pytest.mark.parametrize("divergence", [SkewForwardKL(alpha=0.25), SkewReverseKL(alpha=0.25)])
def test_loss_by_hand(divergence: SkewKL) -> None:
    """2 responses of 3 and 2 tokens over 5; KL(STEEP || FLAT) = 1/4 bit, KL(ANY || FLAT) = 1/2 bit, and FLAT is the mixture."""
    first = torch.tensor([[STEEP, STEEP, STEEP], [ANY, ANY, STEEP]], dtype=torch.float64).log()
    second = torch.tensor([[BESIDE_STEEP] * 3, [BESIDE_ANY, BESIDE_ANY, STEEP]], dtype=torch.float64).log()
    student, teacher = (second, first) if isinstance(divergence, SkewForwardKL) else (first, second)
    case = make_case(student, student, teacher, torch.tensor([[0, 1, 2], [0, 4, 3]]), [3, 2], share=0.0)
    bits: dict[Reduction, float] = {"token_mean": (3 / 4 + 1) / 5, "sequence_mean": 3 / 8, "sequence_sum": 7 / 8}
    for reduction, expected in bits.items():
        loss, metrics = evaluate(DistiLLM(divergence=divergence, reduction=reduction), case)
        assert loss.item() == pytest.approx(expected * math.log(2), abs=1e-12)
        assert metrics["divergence"].item() == pytest.approx(7 / 20 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "value", "gradient"),
    [
        (DistiLLM(), 0.309806, (-0.203951, 0.001230, -0.056331, 0.259053)),
        (DistiLLM(divergence=SkewForwardKL()), 0.277819, (-0.222126, 0.061433, -0.043982, 0.204676)),
    ],
)
def test_golden_loss_and_gradient(algorithm: DistiLLM, value: float, gradient: tuple[float, ...]) -> None:
    """By the formulas of arXiv 2402.03898 at alpha 0.1; with a detached mixture the first gradient's second entry is negative."""
    student = torch.tensor([[[0.2, 0.4, 0.1, 0.3]]], dtype=torch.float64).log()
    teacher = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]], dtype=torch.float64).log()
    loss, got = loss_and_gradient(algorithm, make_case(student, student, teacher, torch.tensor([[1]]), [1], share=0.0))
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert got.flatten().tolist() == pytest.approx(gradient, abs=1.5e-6)


@pytest.mark.parametrize("divergence", BOTH)
def test_models_far_apart_stay_within_the_bound(divergence: SkewKL) -> None:
    """-log 0.1 per token, all but reached; the plain KLs are in the hundreds here."""
    case = random_case([3, 2])
    apart = Case(200 * case.logits, (-200 * case.logits).log_softmax(-1), case.batch)
    loss, gradient = loss_and_gradient(DistiLLM(divergence=divergence), apart)
    assert loss.item() == pytest.approx(-math.log(0.1), abs=1e-9)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("wrong", [{"divergence": {"kind": "forward_kl"}}, {"student_share": 0.5}, {"schedule": {"capacity": 0}}])
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    """Among it a share of its own: that is the schedule's to say."""
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DistiLLM.model_validate(wrong)


# Validation losses, the first before training, and phi after each, by hand: tolerance 0.1, step 0.1.
LOSSES = (2.00, 2.06, 2.12, 2.18, 2.24, 2.10, 2.22, 2.35)
TRACES = [
    # A slow climb is never seen; 2.22 > 2.10 + 0.1 and 2.35 > 2.22 + 0.1.
    (PAPER, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.2)),
    # 2.12 >= 2.00 + 0.1; 2.24 >= 2.12 + 0.1; 2.22 < 2.24 + 0.1 although it is far above 2.10; 2.35 >= 2.24 + 0.1.
    (CODE, (0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3)),
]


@pytest.mark.parametrize(("schedule", "shares"), TRACES, ids=["paper", "code"])
def test_the_student_share_follows_the_validation_loss(schedule: AdaptiveSchedule, shares: tuple[float, ...]) -> None:
    state, seen = schedule.begin(), []
    for loss in LOSSES:
        state = schedule.after(loss, state)
        seen.append(state.student_share)
    assert seen == pytest.approx(shares)


@pytest.mark.parametrize("schedule", [PAPER, CODE], ids=["paper", "code"])
@pytest.mark.parametrize("cut", range(len(LOSSES)))
def test_a_schedule_resumed_in_the_middle_goes_on_as_if_never_stopped(schedule: AdaptiveSchedule, cut: int) -> None:
    whole = schedule.begin()
    for loss in LOSSES:
        whole = schedule.after(loss, whole)
    state = schedule.begin()
    for loss in LOSSES[:cut]:
        state = schedule.after(loss, state)
    state = AdaptiveState(**json.loads(json.dumps(asdict(state))))
    schedule = AdaptiveSchedule.model_validate_json(schedule.model_dump_json())
    for loss in LOSSES[cut:]:
        state = schedule.after(loss, state)
    assert state == whole


def test_a_rise_of_exactly_the_tolerance_counts_in_the_code_only() -> None:
    for schedule, share in ((AdaptiveSchedule(tolerance=0.25), 0.0), (CODE.model_copy(update={"tolerance": 0.25}), 0.1)):
        state = schedule.after(2.25, schedule.after(2.0, schedule.begin()))
        assert state.student_share == share


def test_the_share_starts_where_asked_never_falls_and_ends_at_one() -> None:
    schedule = AdaptiveSchedule(start=0.2, step=0.5)
    state, seen = schedule.begin(), []
    for loss in (1.0, 2.0, 0.5, 1.5, 3.0):
        state = schedule.after(loss, state)
        seen.append(state.student_share)
    assert seen == [0.2, 0.7, 0.7, 1.0, 1.0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="validation loss"):
        PAPER.after(loss, PAPER.begin())


# phi 0.5, 10 steps, batches of 2, a buffer of 4. Per step: the coin, then (generate, learn from) by hand.
COINS = (0.4, 0.6, 0.45, 0.3, 0.34, 0.26, 0.1, 0.5, 0.05, 0.06)
PAPER_TURNS = [
    (True, "replay"),  # 0.4 < 0.5 * 1.0
    (False, "dataset"),
    (False, "replay"),  # 0.45 >= 0.5 * 0.8
    (True, "replay"),  # 0.3 < 0.5 * 0.7
    (False, "replay"),  # 0.34 >= 0.5 * 0.6
    (False, "replay"),  # 0.26 >= 0.5 * 0.5
    (True, "replay"),  # 0.1 < 0.5 * 0.4
    (False, "dataset"),  # 0.5 is not below phi
    (True, "replay"),  # 0.05 < 0.5 * 0.2
    (False, "replay"),  # 0.06 >= 0.5 * 0.1
]
CODE_TURNS = [
    (True, "fresh"),
    (False, "dataset"),
    (True, "fresh"),  # the buffer holds 2 of 4: every student step generates
    (True, "fresh"),  # from here on as the paper, but on the new batch
    (False, "replay"),
    (False, "replay"),
    (True, "fresh"),
    (False, "dataset"),
    (True, "fresh"),
    (False, "replay"),
]


def turns(schedule: AdaptiveSchedule, coins: tuple[float, ...], first: int, held: int) -> tuple[list[tuple[bool, str]], int]:
    """The steps from ``first`` on, with the rows that the buffer holds; what they do, and the rows held at the end."""
    state, seen = AdaptiveState(student_share=0.5), []
    for step, coin in enumerate(coins, start=first):
        turn = schedule.turn(coin, step / 10, state, held, batch_size=2)
        held = min(schedule.capacity, held + 2 * turn.generate)
        seen.append((turn.generate, turn.learn_from))
    return seen, held


@pytest.mark.parametrize(("preset", "expected"), [(PAPER, PAPER_TURNS), (CODE, CODE_TURNS)], ids=["paper", "code"])
def test_who_is_learned_from_by_hand(preset: AdaptiveSchedule, expected: list[tuple[bool, str]]) -> None:
    schedule = preset.model_copy(update={"capacity": 4})
    assert turns(schedule, COINS, 0, 0)[0] == expected
    before, held = turns(schedule, COINS[:3], 0, 0)
    assert before + turns(schedule, COINS[3:], 3, held)[0] == expected


def test_a_buffer_without_a_batch_is_filled_first() -> None:
    late = PAPER.turn(0.09, 0.5, AdaptiveState(student_share=0.1), 0, batch_size=8)
    assert (late.generate, late.learn_from) == (True, "replay")
    assert not PAPER.turn(0.09, 0.5, AdaptiveState(student_share=0.1), 8, batch_size=8).generate


@pytest.mark.parametrize(
    ("schedule", "generated"),
    [(PAPER, 300), (CODE, 300), (AdaptiveSchedule(generation="constant"), 200), (AdaptiveSchedule(generation="increasing"), 100)],
)
def test_shares_with_a_full_buffer(schedule: AdaptiveSchedule, generated: int) -> None:
    """phi 0.4 at a quarter of the training, a thousand evenly spaced coins: phi (1 - s), phi / 2 or phi s of them generate."""
    state = AdaptiveState(student_share=0.4)
    all_turns = [schedule.turn((i + 0.5) / 1000, 0.25, state, schedule.capacity, batch_size=8) for i in range(1000)]
    assert sum(turn.generate for turn in all_turns) == generated
    count = {source: sum(turn.learn_from == source for turn in all_turns) for source in ("fresh", "replay", "dataset")}
    fresh = generated if schedule.train_on_fresh else 0
    assert count == {"fresh": fresh, "replay": 400 - fresh, "dataset": 600}


def test_without_a_raise_the_student_never_writes() -> None:
    for schedule in (PAPER, CODE):
        state = schedule.after(1.9, schedule.after(2.0, schedule.begin()))
        assert schedule.turn(0.0, 0.0, state, 0, batch_size=8).learn_from == "dataset"


def test_the_mixture_is_what_the_turn_says() -> None:
    """phi reaches 0.1 at the third validation of LOSSES under the code's rule: then a low coin writes, a high one does not."""
    algorithm = DistiLLM(schedule=CODE.model_copy(update={"capacity": 16}))

    def mixture(coin: float, held: int, losses: tuple[float, ...] = LOSSES[:3]) -> Mixture:
        return algorithm.mixture(Progress(step=5, steps=10, batch_size=8, coin=coin, held=held, held_out=losses))

    data_alone = Mixture(dataset=1.0, into_replay=False, from_replay=False)
    assert mixture(0.0, held=16, losses=LOSSES[:2]) == mixture(0.1, held=0) == data_alone
    assert mixture(0.07, held=8) == Mixture(student=1.0, from_replay=False)
    assert mixture(0.04, held=16) == Mixture(student=1.0, from_replay=False)
    assert mixture(0.07, held=16) == Mixture()
    assert algorithm.writers == {Source.DATASET, Source.STUDENT}
    assert algorithm.replay == Replay(capacity=16)
    assert algorithm.per_step(Progress(step=5, steps=10, held_out=LOSSES[:3]), []) == {"student_share": 0.1}


def test_presets() -> None:
    assert DistiLLM.paper() == DistiLLM()
    assert DistiLLM().divergence == SkewReverseKL(alpha=0.1) and DistiLLM().text is None
    assert DistiLLM.code().schedule == CODE and DistiLLM.code().text == TextTerm(SFT(), 1.0)
