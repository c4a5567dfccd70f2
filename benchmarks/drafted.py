"""Draft and verify: the other exact form of teacher-mixed sampling, to compare with ``raykd.rollout.mixing``.

The mixture ``a p + (1 - a) q`` is a coin for every token: teacher (p, probability a) or student (q). The student drafts several
tokens, whoever is to write them. At the teacher's places a draft y ~ q becomes a token of p by speculative sampling (arXiv
2211.17192): it is kept with probability ``min(1, p(y) / q(y))``, else another is drawn from ``(p - q)+``, normalised, and the
rest of the draft is dropped. Over the coin, a token is kept with probability ``1 - a + a min(1, p / q)``.

No logits cross. ``(p - q)+`` is drawn by proposing z ~ p until one passes with probability ``(1 - q(z) / p(z))+``: z is proposed
and passes with probability ``(p(z) - q(z))+``, in all TV(p, q), so 1 / TV proposals are needed on average. A draft fails with
probability TV: on average there is one proposal at each of the teacher's places, as if the teacher had written them all.
"""

import random
from collections.abc import Sequence
from itertools import count
from math import exp
from typing import Any, Protocol
from uuid import uuid4

from raykd.rollout.requests import Completion, ScoringWriter, Writer, derive_seed
from raykd.rollout.vllm_engine import VllmEngine


class Verifier(Writer, Protocol):
    """A writer that says how likely it finds some tokens of what others wrote."""

    async def verify(self, text: Sequence[int], places: Sequence[int], *, session: str) -> list[float]: ...


async def verify(engine: VllmEngine, text: Sequence[int], places: Sequence[int], *, session: str) -> list[float]:
    """Log-probs of the tokens at ascending ``places``; between them the engine only reads."""
    pieces = [(place, engine._params(0, 1, asked=text[place], temperature=0.0)) for place in places]
    written = await engine._answer(engine._thread.submit(list(text), pieces, session), "a draft")
    assert written.scored is not None
    return [*written.scored, written.logprobs[0][1]]


async def drafted_response(
    prompt: Sequence[int], student: ScoringWriter, teacher: Verifier, teacher_share: float, max_tokens: int, seed: int, draft: int
) -> Completion:
    """As ``mixed_response``, in drafts of ``draft`` tokens; the log-probs are log q."""
    chance, session = random.Random(derive_seed(seed, "chance")), uuid4().hex
    text, logprobs, finished = list(prompt), [], False
    while not finished and len(text) < len(prompt) + max_tokens:
        start, known = len(text), len(prompt) + len(logprobs)
        length = min(draft, len(prompt) + max_tokens - start)
        part = await student.complete(text, length, derive_seed(seed, start), session=session, score_from=known)
        logprobs += part.scored + part.logprobs
        text += part.tokens
        finished = part.finished
        places = [place for place in range(start, len(text)) if chance.random() < teacher_share]
        verdicts = await teacher.verify(text, places, session=session) if places else []
        for place, log_p in zip(places, verdicts, strict=True):
            if chance.random() >= exp(min(0.0, log_p - logprobs[place - len(prompt)])):
                del text[place:], logprobs[place - len(prompt) :]
                replaced = await _residual(text, student, teacher, chance, seed, session)
                text += replaced.tokens
                logprobs += replaced.logprobs
                finished = replaced.finished
                break
    await student.forget(session)
    await teacher.forget(session)
    return Completion(tuple(text[len(prompt) :]), tuple(logprobs), finished)


async def _residual(
    text: list[int], student: ScoringWriter, teacher: Verifier, chance: random.Random, seed: int, session: str
) -> Completion:
    """One token of ``(p - q)+``, normalised, and its log q."""
    for attempt in count():
        proposed: Any = await teacher.complete(text, 1, derive_seed(seed, len(text), attempt), session=session)
        (log_q,) = (await student.complete([*text, *proposed.tokens], 0, 0, session=session, score_from=len(text))).scored
        if chance.random() < 1 - exp(min(0.0, log_q - proposed.logprobs[0])):
            return Completion(proposed.tokens, (log_q,), proposed.finished)
    raise AssertionError
