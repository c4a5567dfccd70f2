"""Teacher-mixed sampling (MiniLLM, arXiv 2306.08543, section 2.2) with two engines and no logits between them."""

import random
from collections.abc import Sequence
from itertools import groupby

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
    tokens: list[int] = []
    logprobs: list[float] = []
    by_teacher: list[int] = []
    finished = False
    for is_teacher, run in groupby(teacher_writes):
        writer = teacher if is_teacher else student
        part = await writer.complete([*prompt, *tokens], len(list(run)), derive_seed(seed, len(tokens)))
        if is_teacher:
            by_teacher.extend(range(len(tokens), len(tokens) + len(part.tokens)))
        tokens.extend(part.tokens)
        logprobs.extend(part.logprobs)
        finished = part.finished
        if finished:
            break
    if by_teacher:
        scored = await student.score([*prompt, *tokens], len(prompt) + by_teacher[0])
        for position in by_teacher:
            logprobs[position] = scored[position - by_teacher[0]]
    return Completion(tuple(tokens), tuple(logprobs), finished)
