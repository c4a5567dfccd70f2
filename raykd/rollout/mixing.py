"""Teacher-mixed sampling (MiniLLM, arXiv 2306.08543, section 2.2) with two engines and no logits between them."""

import asyncio
import random
from collections.abc import Sequence
from itertools import groupby
from uuid import uuid4

from raykd.rollout.requests import Completion, ScoringWriter, Writer, derive_seed


async def mixed_response(
    prompt: Sequence[int], student: ScoringWriter, teacher: Writer, teacher_share: float, max_tokens: int, seed: int
) -> Completion:
    """Draw a response whose every token follows ``a p(.|x, y_<t) + (1 - a) q(.|x, y_<t)``, exactly.

    ``p`` is the teacher, ``q`` the student, ``a`` the ``teacher_share``; a response ends at EOS, whoever writes it.
    The returned log-probs are log q of every token, the teacher's tokens included; [T].
    """
    # Why this is exact. Drawing from a p + (1 - a) q is: flip a coin, then draw from p (heads, probability a) or from q.
    # The coins are independent of the text, so all can be flipped before the first token. Consecutive equal coins are
    # consecutive draws of one model, each conditional on all tokens before it, and that is what this model's engine does
    # in one call of as many tokens. Coins have no memory: run lengths are geometric, and an EOS inside a run just leaves
    # the remaining coins unused.
    coins = random.Random(derive_seed(seed, "coins"))
    teacher_writes = [coins.random() < teacher_share for _ in range(max_tokens)]
    session = uuid4().hex  # both engines keep the text at hand: each computes every token once
    text, logprobs, finished = list(prompt), [], False
    try:
        for is_teacher, run in groupby(teacher_writes):
            length, run_seed = len(list(run)), derive_seed(seed, len(text) - len(prompt))
            if is_teacher:
                part = await teacher.complete(text, length, run_seed, session=session)
            else:
                part = await student.complete(text, length, run_seed, session=session, score_from=len(prompt) + len(logprobs))
                logprobs += part.scored + part.logprobs
            text += part.tokens
            if finished := part.finished:
                break
        if (scored := len(prompt) + len(logprobs)) < len(text):
            logprobs += (await student.complete(text, 0, seed, session=session, score_from=scored)).scored
    finally:
        await asyncio.gather(student.forget(session), teacher.forget(session))
    return Completion(tuple(text[len(prompt) :]), tuple(logprobs), finished)
