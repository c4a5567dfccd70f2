import asyncio
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from drafted import drafted_response, verify
from ray.exceptions import ActorDiedError
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

from raykd.actors import RemoteWriter
from raykd.records import Source
from raykd.rollout.mixing import mixed_response
from raykd.rollout.requests import Completion, GenerationRequest, derive_seed
from raykd.rollout.vllm_engine import VllmEngine

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("data")]

SHARE = 0.3
RESPONSES = 4_400
PROMPT = (1, 4, 2)


def requests(count: int, prompt: tuple[int, ...] = PROMPT) -> list[GenerationRequest]:
    return [GenerationRequest(prompt_id="p", sample=i, prompt_tokens=prompt, salt=0) for i in range(count)]


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


class Verifier:
    """The teacher's engine as drafts see it."""

    def __init__(self, engine: VllmEngine) -> None:
        self.complete, self.forget, self.verify = engine.complete, engine.forget, partial(verify, engine)


async def drafted(student: VllmEngine, teacher: VllmEngine) -> list[Completion]:
    verifier, places = Verifier(teacher), asyncio.Semaphore(200)

    async def write(seed: int) -> Completion:
        async with places:
            return await drafted_response(PROMPT, student, verifier, SHARE, 60, seed, draft=4)

    return await asyncio.gather(*(write(seed) for seed in range(RESPONSES)))


@pytest.fixture(scope="module", params=["in runs", "in drafts"])
def responses(request) -> list[tuple[int, ...]]:
    """Many mixed responses, over 100,000 tokens together."""
    student, teacher = worker(folder("tiny-q")), worker(folder("tiny-p")).engine
    if request.param == "in runs":
        drawn = [rollout.tokens for rollout in wait(student.generate(requests(RESPONSES), SHARE, 60, teacher))]
    else:
        drawn = [response.tokens for response in wait(drafted(student.engine, teacher))]
    assert sum(map(len, drawn)) >= 100_000
    return drawn


@pytest.fixture(scope="module")
def laws(responses) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens of all responses, and what teacher and student give each possible token at their places; [N], [N, V], [N, V]."""
    ids = torch.full((len(responses), len(PROMPT) + 60), TINY_EOS)
    written = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(responses):
        ids[row, : len(PROMPT) + len(tokens)] = torch.tensor([*PROMPT, *tokens])
        written[row, len(PROMPT) : len(PROMPT) + len(tokens)] = True
    with torch.no_grad():
        p, q = (
            torch.cat([reference(folder(name))(part).logits[:, :-1, :TINY_VOCABULARY] for part in ids.split(1000)]).softmax(-1)
            for name in ("tiny-p", "tiny-q")
        )
    return ids[written], p[written[:, 1:]].double(), q[written[:, 1:]].double()


def test_the_first_token_follows_the_mixture(responses):
    first = Counter(tokens[0] for tokens in responses)
    assert p_value([chi_squared(first, mixture(PROMPT, SHARE))]) > 1e-4
    for wrong in (0.0, SHARE - 0.2, SHARE + 0.2, 1.0):
        assert p_value([chi_squared(first, mixture(PROMPT, wrong))]) < 1e-4, "the test has no power"


def test_the_second_token_follows_the_mixture_given_the_first(responses):
    assert all(len(tokens) == 1 for tokens in responses if tokens[0] == TINY_EOS)
    firsts = [token for token in range(TINY_VOCABULARY) if token != TINY_EOS]
    second = {first: Counter(tokens[1] for tokens in responses if tokens[0] == first) for first in firsts}
    for share, follows in ((SHARE, True), (0.0, False), (SHARE - 0.2, False), (SHARE + 0.2, False), (1.0, False)):
        parts = [chi_squared(counts, mixture((*PROMPT, first), share)) for first, counts in second.items()]
        assert (p_value(parts) > 1e-4) is follows


def test_every_token_follows_the_mixture_given_all_tokens_before_it(laws):
    """The probability integral transform of each token under its law is uniform, and independent of the others'.

    The cumulative distribution goes through the vocabulary by p / q, so that a wrong share shows where it differs most.
    """
    tokens, p, q = laws
    order = (p / q).argsort(-1)
    rank = (order == tokens[:, None]).int().argmax(-1, keepdim=True)
    within = torch.rand(len(tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for share, follows in ((SHARE, True), (SHARE - 0.05, False), (SHARE + 0.05, False)):
        law = (share * p + (1 - share) * q).gather(-1, order)
        uniform = (law.cumsum(-1) - law).gather(-1, rank)[:, 0] + within * law.gather(-1, rank)[:, 0]
        observed = torch.histc(uniform, bins=100, min=0, max=1)
        expected = len(tokens) / 100
        statistic = ((observed - expected) ** 2 / expected).sum().item()
        assert (p_value([(statistic, 99)]) > 1e-4) is follows, share


def test_the_share_is_the_one_asked_for(laws):
    """The derivative of the likelihood in the share, sum (p - q) / m of the tokens, is 0 on average at the true one alone."""
    tokens, *both = laws
    p, q = (law.gather(-1, tokens[:, None])[:, 0] for law in both)
    for share, follows in ((SHARE, True), (SHARE - 0.02, False), (SHARE + 0.02, False)):
        slopes = (p - q) / (share * p + (1 - share) * q)
        assert (abs(slopes.sum()) < 4 * slopes.square().sum().sqrt()) == follows, share


def test_the_student_alone_samples_at_the_temperature_asked_for():
    """The first tokens at 0.5, half the requests of a batch; log-probs stay those at 1."""
    warm = requests(1_500)
    cold = [replace(request, sample=1_500 + request.sample, temperature=0.5) for request in warm]
    written = wait(worker(folder("tiny-q")).generate([*warm, *cold], 0.0, 1))
    q = law("tiny-q", PROMPT)
    for part, temperature in ((written[:1_500], 1.0), (written[1_500:], 0.5)):
        assert {rollout.temperature for rollout in part} == {temperature}
        first = Counter(rollout.tokens[0] for rollout in part)
        for candidate in (1.0, 0.5):
            expected = q.pow(1 / candidate) / q.pow(1 / candidate).sum()
            assert (p_value([chi_squared(first, expected)]) > 1e-4) is (candidate == temperature)
        for rollout in part[:20]:
            assert rollout.student_logprobs == pytest.approx([q[rollout.tokens[0]].log().item()], abs=1e-4)


def test_what_both_write_is_sampled_at_temperature_1_or_refused():
    student, teacher = worker(folder("tiny-q")), worker(folder("tiny-p")).engine
    with pytest.raises(ValueError, match=r"temperature must be 1 .* got 0\.5"):
        wait(student.generate([replace(request, temperature=0.5) for request in requests(2)], SHARE, 8, teacher))


@pytest.mark.parametrize(("share", "source"), [(0.0, Source.STUDENT), (0.2, Source.MIXED), (1.0, Source.TEACHER)])
def test_student_logprobs_of_every_token_are_those_of_hugging_face(share, source):
    for rollout in wait(worker(STORIES).generate(requests(8, prompt=(1, 403, 407)), share, 60, worker(folder("teacher")).engine)):
        expected = chosen_logprobs(reference(STORIES), [1, 403, 407, *rollout.tokens], 3)
        torch.testing.assert_close(torch.tensor(rollout.student_logprobs), expected, atol=1e-4, rtol=0)
        assert (rollout.source, rollout.teacher_share, rollout.version) == (source, share, 0)


def test_logprobs_of_drafted_tokens_are_those_of_hugging_face():
    student, teacher, prompt = worker(STORIES).engine, Verifier(worker(folder("teacher")).engine), (1, 403, 407)
    for seed in range(4):
        drafted = wait(drafted_response(prompt, student, teacher, 0.5, 60, seed, draft=5))
        expected = chosen_logprobs(reference(STORIES), [*prompt, *drafted.tokens], 3)
        torch.testing.assert_close(torch.tensor(drafted.logprobs), expected, atol=1e-4, rtol=0)


def test_shares_zero_and_one_are_the_student_and_the_teacher_alone():
    student, teacher = worker(folder("tiny-q")).engine, worker(folder("tiny-p")).engine
    for share, writer in ((0.0, student), (1.0, teacher)):
        mixed = wait(mixed_response(PROMPT, student, teacher, share, 30, seed=4))
        assert mixed.tokens == wait(writer.complete(PROMPT, 30, derive_seed(4, 0))).tokens


@pytest.mark.parametrize("ends", [{TINY_EOS}, {TINY_EOS, 4}])
def test_a_response_ends_at_any_eos_whoever_writes_it_and_a_cut_one_is_unfinished(ends, monkeypatch):
    student, teacher = worker(folder("tiny-q")), worker(folder("tiny-p")).engine
    for engine in (student.engine, teacher):
        monkeypatch.setattr(engine, "_eos_token_ids", [*ends])
    for share in (0.0, 0.5, 1.0):
        rollouts = wait(student.generate(requests(100), share, 12, teacher))
        assert {rollout.tokens[-1] for rollout in rollouts if rollout.finished} == ends
        assert any(not rollout.finished for rollout in rollouts)
        for rollout in rollouts:
            assert not ends & {*rollout.tokens[:-1]}
            assert rollout.finished == (rollout.tokens[-1] in ends) and len(rollout.tokens) == len(rollout.student_logprobs)
            assert rollout.finished or len(rollout.tokens) == 12


class Forgetful:
    """An engine that has lost every text by the next call, as a replica that died and came back."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    async def complete(self, text, max_tokens, seed, *, session, score_from=None):
        await self._engine.forget(session)
        return await self._engine.complete(text, max_tokens, seed, session=session, score_from=score_from)

    async def forget(self, session):
        await self._engine.forget(session)


def test_a_response_does_not_depend_on_what_its_engines_remember():
    student, teacher = worker(STORIES).engine, worker(folder("teacher")).engine

    async def write(student, teacher):
        return await asyncio.gather(*(mixed_response((1, 403, 407), student, teacher, 0.4, 50, seed) for seed in range(8)))

    remembered, forgotten = wait(write(student, teacher)), wait(write(Forgetful(student), Forgetful(teacher)))
    assert [response.tokens for response in remembered] == [response.tokens for response in forgotten]
    for one, other in zip(remembered, forgotten, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


def test_no_text_stays_behind():
    student, teacher = worker(folder("tiny-q")), worker(folder("tiny-p"))

    async def abandon():
        writing = asyncio.ensure_future(student.generate(requests(100), 0.5, 60, teacher.engine))
        await asyncio.sleep(0.2)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    wait(abandon())
    assert len(wait(student.generate(requests(100), 0.5, 60, teacher.engine))) == 100
    for engine in (student.engine, teacher.engine):
        assert wait(engine.inspect(lambda vllm: vllm.get_num_unfinished_requests())) == 0


def test_more_texts_than_an_engine_has_room_for_are_written_all_the_same():
    student, teacher = worker(folder("tiny-q")).engine, worker(folder("tiny-p")).engine
    room = wait(teacher.inspect(lambda vllm: vllm.vllm_config.scheduler_config.max_num_seqs))

    async def write():
        return await asyncio.gather(*(mixed_response(PROMPT, student, teacher, 0.5, 12, seed) for seed in range(room + 40)))

    together = wait(write())
    for seed in (0, room + 39):
        assert together[seed] == wait(mixed_response(PROMPT, student, teacher, 0.5, 12, seed))


def test_a_response_that_fills_the_context_is_written_and_scored_to_its_end():
    engine = worker(STORIES).engine
    prompt = [1, *[400, 401, 402] * 79, 403, 404]

    async def write():
        return await asyncio.gather(*(mixed_response(prompt, engine, engine, 0.5, 16, seed) for seed in range(24)))

    written = wait(write())
    assert any(len(completion.tokens) == 16 for completion in written)  # 240 + 16 tokens, all that the engine takes
    assert all(len(completion.tokens) == len(completion.logprobs) for completion in written)


class Replica:
    """What a writer sees of an actor; ``fate`` is raised once ``calls`` calls are answered."""

    def __init__(self, engine: VllmEngine, fate: Exception | None = None, calls: int = 0) -> None:
        self._engine, self._fate, self._left = engine, fate, calls
        self.complete, self.forget = SimpleNamespace(remote=self._complete), SimpleNamespace(remote=self._forget)

    async def _complete(self, turns, max_tokens):
        self._left -= 1
        if self._fate is not None and self._left < 0:
            raise self._fate
        return [await self._engine.complete(text, max_tokens, seed, session=session) for text, seed, session in turns]

    def _forget(self, session):
        return asyncio.ensure_future(self._engine.forget(session))


def test_a_teacher_that_dies_in_the_middle_of_a_response_is_replaced_by_another():
    student, engine = worker(STORIES).engine, worker(folder("teacher")).engine

    async def write(handles):
        teacher = RemoteWriter(handles)
        writing = (mixed_response((1, 403, 407), student, teacher, 0.4, 50, seed) for seed in range(8))
        return [response.tokens for response in await asyncio.gather(*writing)]

    expected = wait(write([Replica(engine)]))
    died = ActorDiedError()
    assert wait(write([Replica(engine, died, calls=20), Replica(engine), Replica(engine, died, calls=1)])) == expected
    with pytest.raises(ActorDiedError):
        wait(write([Replica(engine, died, calls=9)]))


def test_an_error_of_the_teacher_is_an_error_of_the_call():
    class Gone:
        async def complete(self, text, max_tokens, seed, *, session):
            raise ConnectionError("the teacher is gone")

        async def forget(self, session):
            pass

    student = worker(folder("tiny-q"))
    with pytest.raises(ConnectionError, match="teacher is gone"):
        wait(student.generate(requests(4), 0.5, 12, Gone()))
    assert len(wait(student.generate(requests(4), 0.0, 12))) == 4
