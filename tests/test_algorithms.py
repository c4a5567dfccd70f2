"""What every algorithm must keep, in each of its variants."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from algorithm_cases import Case, counted, evaluate, learned, loss_and_gradient, make_case, part, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from raykd.algorithms import AKL, GKD, KD, OPD, SFT, Algorithm, AnyAlgorithm, DistiLLM, DistiLLM2, ImitKD, MiniLLM, Needs, SeqKD
from raykd.algorithms.base import Reduction
from raykd.algorithms.token_divergences import AnyDivergence, ReverseKL, SkewForwardKL, TopK

DIVERGENCES = [kind(k=2) if kind is TopK else kind() for kind in get_args(get_args(AnyDivergence)[0])]
OF_TEXT = (SFT(), SeqKD())
"""What the teacher's numbers do not reach."""
BESIDE_THE_TEACHER = (*OF_TEXT, KD(data_weight=0.5), GKD(reward_weight=0.3))
"""What a student that equals its teacher still learns from."""
VARIANTS: dict[Needs, list[AnyAlgorithm]] = {
    Needs.NOTHING: [SFT()],
    Needs.SAMPLED: [SeqKD(), OPD(), OPD(clip=0.2, discount=0.9), MiniLLM(single_step=False)],
    Needs.DISTRIBUTION: [
        KD(),
        KD(data_weight=0.5),
        ImitKD(),
        *(GKD(divergence=divergence) for divergence in [*DIVERGENCES, TopK(k=3, of=ReverseKL())]),
        GKD.paper(),
        GKD.trl(),
        GKD(temperature=2.0),
        GKD(reward_weight=0.3),
        GKD(importance_limit=1.2),
        DistiLLM(),
        DistiLLM(divergence=SkewForwardKL(alpha=0.3)),
        DistiLLM.code(),
        AKL(),
        AKL(boundary="prefix", head_mass=0.4, student_share=0.5, importance_limit=1.2),
    ],
    Needs.BOTH: [DistiLLM2(), DistiLLM2.code(), MiniLLM(), MiniLLM.paper(), MiniLLM.lmops(), MiniLLM(whiten="tokens")],
}
EVERY = [algorithm for variants in VARIANTS.values() for algorithm in variants]


def named(algorithm: AnyAlgorithm) -> str:
    default, fields = type(algorithm)(), type(algorithm).model_fields
    changed = (name for name in fields if getattr(algorithm, name) != getattr(default, name))
    return " ".join([algorithm.kind, *(f"{name}={getattr(algorithm, name)}" for name in changed)])


def of_each(algorithms: list[AnyAlgorithm]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("algorithm", algorithms, ids=named)


def taught(case: Case, teacher: Tensor) -> Case:
    """The same responses, fresh from the student, with another teacher."""
    lengths = case.batch.mask.sum(-1).tolist()
    made = make_case(case.logits, case.logits, teacher.log_softmax(-1), case.batch.tokens, lengths, share=0.0)
    return replace(made, batch=replace(made.batch, by_student=case.batch.by_student, rewards=case.batch.rewards))


def reached(algorithm: Algorithm, mask: Tensor) -> Tensor:
    """Where another teacher moves the gradient: nowhere, wherever something follows that it rewards, or at every real token."""
    if algorithm in OF_TEXT:
        return torch.zeros_like(mask)
    rewards_alone = isinstance(algorithm, MiniLLM) and not algorithm.single_step
    return torch.nn.functional.pad(mask[:, 1:], (0, 1)) if rewards_alone else mask


def test_every_algorithm_is_among_these() -> None:
    assert {type(algorithm) for algorithm in EVERY} == set(get_args(get_args(AnyAlgorithm)[0]))


@of_each(EVERY)
def test_another_teacher_moves_the_gradient_where_it_should_and_nowhere_else(algorithm: Algorithm) -> None:
    """A teacher with the student's preferences sharpened, then one with the opposite preferences."""
    case = random_case([4, 2])
    first, second = (loss_and_gradient(algorithm, taught(case, factor * case.logits))[1] for factor in (2, -2))
    assert torch.equal((first - second).abs().amax(-1) > 1e-4, reached(algorithm, case.batch.mask))


@of_each([algorithm for algorithm in EVERY if algorithm not in BESIDE_THE_TEACHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_student_equal_to_the_teacher_has_nothing_to_learn(algorithm: Algorithm, dtype: torch.dtype) -> None:
    case = random_case([3, 2])
    logits = case.logits.to(dtype)
    loss, gradient = loss_and_gradient(algorithm, taught(replace(case, logits=logits), logits))
    assert max(loss.abs().item(), gradient.abs().max().item()) < 8 * torch.finfo(dtype).eps
    assert gradient.isfinite().all()


@of_each(EVERY)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=2, max_size=6),
    seed=st.integers(0, 99),
    reduction=st.sampled_from(get_args(Reduction)),
)
def test_any_split_into_micro_batches_sums_to_the_whole(
    algorithm: Algorithm, rows: list[tuple[int, int]], seed: int, reduction: Reduction
) -> None:
    """Of each row its length and its micro-batch. Loss, metrics and gradient, with all padding of the parts cut away."""
    algorithm = algorithm.model_copy(update={"reduction": reduction})
    case = counted(algorithm, random_case([length for length, _ in rows], seed=seed))
    split = [[row for row, (_, which) in enumerate(rows) if which == micro_batch] for micro_batch in range(3)]
    loss, metrics, gradient = learned(algorithm, case)
    parts = [(some, *learned(algorithm, part(case, some))) for some in split if some]
    torch.testing.assert_close(sum(part_loss for _, part_loss, _, _ in parts), loss)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part_metrics[name] for _, _, part_metrics, _ in parts), value, msg=name)
    rebuilt = torch.zeros_like(gradient)
    for some, _, _, part_gradient in parts:
        rebuilt[some, : part_gradient.shape[1]] = part_gradient
    torch.testing.assert_close(rebuilt, gradient)


@of_each(EVERY)
def test_a_token_costs_the_same_alone(algorithm: Algorithm) -> None:
    """So that any chunk can be differentiated as soon as it exists."""
    case = counted(algorithm, random_case([3, 2]))
    batch, mask = case.batch, case.batch.mask
    known = {name: values[mask] for name, values in algorithm.per_sequence(batch).items()}
    student, teacher, tokens = case.logits.log_softmax(-1)[mask], case.teacher[mask], batch.tokens[mask]
    whole = algorithm.per_token(student, teacher, tokens, known)
    for n in range(5):
        one = slice(n, n + 1)
        alone = algorithm.per_token(
            student[one], teacher[one], tokens[one], {name: values[one] for name, values in known.items()}
        )
        torch.testing.assert_close(alone, {name: values[one] for name, values in whole.items()})


@of_each(EVERY)
def test_what_stands_in_the_padding_does_not_matter(algorithm: Algorithm) -> None:
    case = counted(algorithm, random_case([3, 1]))
    padding = ~case.batch.mask
    filled = {"tokens": case.batch.tokens.masked_fill(padding, 3)} | {
        name: getattr(case.batch, name).masked_fill(padding, -7.0)
        for name in ("student_logprobs", "teacher_logprobs", "behaviour_logprobs")
    }
    dirty = learned(algorithm, replace(case, batch=replace(case.batch, **filled)))
    torch.testing.assert_close(dirty, learned(algorithm, case))
    assert not dirty[-1][padding].any()


@of_each(EVERY)
def test_nothing_to_learn_gives_zero(algorithm: Algorithm) -> None:
    """No tokens, only padding, no responses: loss and metrics are 0, and the gradient exists and is 0."""
    padding = random_case([3, 2])
    masked = replace(padding, batch=replace(padding.batch, mask=torch.zeros_like(padding.batch.mask)))
    for case in (random_case([0, 0]), masked, random_case([])):
        loss, metrics, gradient = learned(algorithm, case)
        assert loss.item() == 0 and not gradient.any()
        assert all(value.item() == 0 for value in metrics.values()), metrics


@pytest.mark.parametrize("needs", VARIANTS)
def test_of_the_teacher_is_read_what_is_said_to_be_needed(needs: Needs) -> None:
    """The numbers say where a teacher that is not a number has reached them; without the distribution the teacher is None."""
    case = random_case([3, 2])
    unsure = torch.full_like(case.batch.teacher_logprobs, torch.nan)
    for algorithm in VARIANTS[needs]:
        assert algorithm.needs is needs
        assert is_spoilt(algorithm, replace(case, batch=replace(case.batch, teacher_logprobs=unsure))) is needs.sampled
        assert is_spoilt(algorithm, replace(case, teacher=torch.full_like(case.teacher, torch.nan))) is needs.distribution


def is_spoilt(algorithm: Algorithm, case: Case) -> bool:
    """Whether a number of the step or of its tokens is none."""
    case = counted(algorithm, case)
    loss, metrics = evaluate(algorithm, case)
    return any(math.isnan(value) for value in (*case.batch.totals.numbers.values(), loss, *metrics.values()))


@pytest.mark.parametrize("kind", [KD, ImitKD, GKD, DistiLLM, AKL])
def test_text_of_an_older_student_is_weighed_where_that_is_asked(kind: type[KD | ImitKD | GKD | DistiLLM | AKL]) -> None:
    case = random_case([3, 2])
    (weighed, metrics), (plain, _) = evaluate(kind(importance_limit=1.2), case), evaluate(kind(), case)
    assert "importance_weight" in metrics and (weighed - plain).abs() > 1e-3


@of_each(EVERY)
def test_it_survives_json_and_misspelt_fields_do_not(algorithm: AnyAlgorithm) -> None:
    adapter: TypeAdapter[AnyAlgorithm] = TypeAdapter(AnyAlgorithm)
    assert adapter.validate_json(algorithm.model_dump_json()) == algorithm
    assert adapter.validate_python({"kind": algorithm.kind}) == type(algorithm)()
    with pytest.raises(ValidationError, match="reductoin"):
        adapter.validate_python({"kind": algorithm.kind, "reductoin": "token_mean"})
    with pytest.raises(ValidationError, match="frozen"):
        algorithm.reduction = "sequence_mean"
