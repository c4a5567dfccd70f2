import asyncio
from collections import Counter
from functools import cache

import pytest
import torch
from rollout_stack import (
    STORIES,
    TINY_EOS,
    TINY_VOCABULARY,
    chosen_logprobs,
    folder,
    reference,
    reference_logprobs,
    wait,
    worker,
)

from raykd.records import Source
from raykd.rollout.mixing import mixed_response
from raykd.rollout.requests import Completion, GenerationRequest, derive_seed

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("data")]

SHARE = 0.3
PROMPT = (1, 4, 2)


@cache
def law(name: str, prefix: tuple[int, ...]) -> torch.Tensor:
    """One model's next token after a prefix, from Hugging Face; [V]."""
    return reference_logprobs(reference(folder(name)), [*prefix, 0], len(prefix))[0].exp()


def mixture(prefix: tuple[int, ...], share: float) -> torch.Tensor:
    return share * law("tiny-p", prefix) + (1 - share) * law("tiny-q", prefix)


def chi_squared(counts: Counter, law: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; outcomes expected fewer than 5 times are pooled."""
    observed = torch.tensor([counts[token] for token in range(TINY_VOCABULARY)], dtype=torch.float64)
    expected = law.double() * observed.sum()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    return statistic, int(kept.sum()) - 1


def p_value(parts: list[tuple[float, int]]) -> float:
    statistic, degrees = (torch.tensor(sum(column) / 2, dtype=torch.float64) for column in zip(*parts, strict=True))
    return torch.special.gammaincc(degrees, statistic).item()


@pytest.fixture(scope="module")
def pairs() -> list[tuple[int, ...]]:
    """The first two tokens of many mixed responses."""

    async def sample() -> list[Completion]:
        student, teacher = worker(folder("tiny-q")).engine, worker(folder("tiny-p")).engine
        return await asyncio.gather(*(mixed_response(PROMPT, student, teacher, SHARE, 2, seed) for seed in range(11_000)))

    responses = [response.tokens for response in wait(sample())]
    assert sum(map(len, responses)) >= 20_000
    return responses


def test_the_first_token_follows_the_mixture(pairs):
    first = Counter(tokens[0] for tokens in pairs)
    assert p_value([chi_squared(first, mixture(PROMPT, SHARE))]) > 1e-4
    for wrong in (0.0, SHARE - 0.1, SHARE + 0.1, 1.0):
        assert p_value([chi_squared(first, mixture(PROMPT, wrong))]) < 1e-4, "the test has no power"


def test_the_second_token_follows_the_mixture_given_the_first(pairs):
    assert all(len(tokens) == 1 for tokens in pairs if tokens[0] == TINY_EOS)
    firsts = [token for token in range(TINY_VOCABULARY) if token != TINY_EOS]
    second = {first: Counter(tokens[1] for tokens in pairs if tokens[0] == first) for first in firsts}
    for share, follows in ((SHARE, True), (0.0, False), (SHARE - 0.1, False), (SHARE + 0.1, False), (1.0, False)):
        parts = [chi_squared(counts, mixture((*PROMPT, first), share)) for first, counts in second.items()]
        assert (p_value(parts) > 1e-4) is follows


@pytest.mark.parametrize(("share", "source"), [(0.0, Source.STUDENT), (0.2, Source.MIXED), (1.0, Source.TEACHER)])
def test_student_logprobs_of_every_token_are_those_of_hugging_face(share, source):
    requests = [GenerationRequest(prompt_id="p", sample=i, prompt_tokens=(1, 403, 407), salt=0) for i in range(8)]
    for rollout in wait(worker(STORIES).generate(requests, share, 60, worker(folder("teacher")).engine)):
        expected = chosen_logprobs(reference(STORIES), [1, 403, 407, *rollout.tokens], 3)
        torch.testing.assert_close(torch.tensor(rollout.student_logprobs), expected, atol=1e-4, rtol=0)
        assert (rollout.source, rollout.teacher_share, rollout.version) == (source, share, 0)


def test_shares_zero_and_one_are_the_student_and_the_teacher_alone():
    student, teacher = worker(folder("tiny-q")).engine, worker(folder("tiny-p")).engine
    for share, writer in ((0.0, student), (1.0, teacher)):
        mixed = wait(mixed_response(PROMPT, student, teacher, share, 30, seed=4))
        assert mixed.tokens == wait(writer.complete(PROMPT, 30, derive_seed(4, 0))).tokens


def test_a_response_ends_at_eos_whoever_writes_it_and_a_cut_one_is_unfinished():
    requests = [GenerationRequest(prompt_id="p", sample=i, prompt_tokens=PROMPT, salt=0) for i in range(100)]
    for share in (0.0, 0.5, 1.0):
        rollouts = wait(worker(folder("tiny-q")).generate(requests, share, 12, worker(folder("tiny-p")).engine))
        assert {rollout.finished for rollout in rollouts} == {True, False}
        for rollout in rollouts:
            assert TINY_EOS not in rollout.tokens[:-1]
            assert rollout.finished == (rollout.tokens[-1] == TINY_EOS)
            assert rollout.finished or len(rollout.tokens) == 12


def test_an_error_of_the_teacher_is_an_error_of_the_call():
    class Gone:
        async def complete(self, tokens, max_tokens, seed):
            raise ConnectionError("the teacher is gone")

    requests = [GenerationRequest(prompt_id="p", sample=i, prompt_tokens=PROMPT, salt=0) for i in range(4)]
    student = worker(folder("tiny-q"))
    with pytest.raises(ConnectionError, match="teacher is gone"):
        wait(student.generate(requests, 0.5, 12, Gone()))
    assert len(wait(student.generate(requests, 0.0, 12))) == 4
