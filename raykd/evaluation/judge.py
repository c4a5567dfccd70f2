"""An LLM's opinion of an answer beside the reference's, through any endpoint that speaks OpenAI's protocol, vLLM's own included.

MiniLLM's GPT-4 score: both answers are rated from 1 to 10, score = 100 * sum of the model's ratings / sum of the references'.
Judges favour what comes first (Zheng et al., NeurIPS 2023), so each pair is rated in both orders and the ratings averaged.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openai import APIConnectionError, AsyncOpenAI, OpenAIError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raykd.value import Value

INSTRUCTION = (
    "Rate two answers to a question for helpfulness, relevance, accuracy and level of detail, each from 1 (worst) to 10 (best). "
    "Neither the order of the answers nor their length may influence you."
)
PAIR = "[Question]\n{question}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}"

Rating = Literal[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


class Ratings(BaseModel):
    """What the judge must reply, held to it by the endpoint's structured output."""

    model_config = ConfigDict(extra="forbid")

    answer_a: Rating
    answer_b: Rating


class Judge(Value):
    """An endpoint and the model it serves; the key is read from OPENAI_API_KEY."""

    url: str
    """Base address, e.g. ``http://localhost:8000/v1``."""
    model: str
    """Name of the judging model there."""
    concurrency: int = Field(default=16, ge=1)
    """Requests at a time."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Longest wait for one reply; failed requests are tried again a few times."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged beside a reference."""

    question: str
    answer: str
    reference: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mean ratings over both orders."""

    answer: float
    reference: float


def check_judge(judge: Judge) -> None:
    """Raise ValueError unless the endpoint answers and serves the model."""
    served = asyncio.run(_served(judge))
    if judge.model not in served:
        raise ValueError(f"judge.model {judge.model} is not served at {judge.url}, which has {', '.join(served) or 'no model'}")


def judge_answers(judge: Judge, cases: Sequence[Case]) -> list[Verdict | None]:
    """A verdict for each case; None, and a warning with the reason, where the judge gave no valid ratings."""
    return asyncio.run(_rate_all(judge, cases))


def summary(verdicts: Sequence[Verdict | None]) -> dict[str, float]:
    """Score and win rate over the cases that have a verdict, and how many have none; all in percent."""
    given = [verdict for verdict in verdicts if verdict is not None]
    unrated = {"judge_unrated": 100 * (1 - len(given) / len(verdicts))}
    return {"judge_score": score(given), "judge_win_rate": win_rate(given)} | unrated if given else unrated


def score(verdicts: Sequence[Verdict]) -> float:
    """100 * sum of the answers' ratings / sum of the references'."""
    return 100 * sum(verdict.answer for verdict in verdicts) / sum(verdict.reference for verdict in verdicts)


def win_rate(verdicts: Sequence[Verdict]) -> float:
    """100 * the share of answers rated above their reference, a tie being half a win."""
    wins = [(verdict.answer > verdict.reference) + 0.5 * (verdict.answer == verdict.reference) for verdict in verdicts]
    return 100 * sum(wins) / len(wins)


async def _rate_all(judge: Judge, cases: Sequence[Case]) -> list[Verdict | None]:
    turn = asyncio.Semaphore(judge.concurrency)

    async with _client(judge) as client:

        async def verdict(case: Case) -> Verdict | None:
            async with turn:
                one = await _ratings(client, judge.model, case.question, case.answer, case.reference)
                other = await _ratings(client, judge.model, case.question, case.reference, case.answer)
            if one is None or other is None:
                return None
            return Verdict((one.answer_a + other.answer_b) / 2, (one.answer_b + other.answer_a) / 2)

        return await asyncio.gather(*map(verdict, cases))


async def _ratings(client: AsyncOpenAI, model: str, question: str, first: str, second: str) -> Ratings | None:
    pair = PAIR.format(question=question, first=first, second=second)
    try:
        reply = await client.chat.completions.parse(
            model=model,
            messages=[{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": pair}],
            response_format=Ratings,
            temperature=0.0,
        )
    except (ValidationError, OpenAIError) as error:  # not in the form asked for, or no reply after all retries
        logging.getLogger(__name__).warning("the judge gave no ratings: %s", error)
        return None
    return reply.choices[0].message.parsed


async def _served(judge: Judge) -> list[str]:
    try:
        async with _client(judge) as client:
            return [model.id async for model in client.models.list()]
    except APIConnectionError as error:
        raise ValueError(f"judge.url {judge.url} cannot be reached; start the server, or mend the address") from error
    except OpenAIError as error:
        raise ValueError(f"judge.url {judge.url} refuses: {error}; set OPENAI_API_KEY, or mend the address") from error
    except (AttributeError, ValueError) as error:  # how the client fails on a reply in another form
        raise ValueError(
            f"judge.url {judge.url} gives no list of models; mend the address of the endpoint, which often ends in /v1"
        ) from error


def _client(judge: Judge) -> AsyncOpenAI:
    key = os.environ.get("OPENAI_API_KEY", "none")  # local servers want none
    return AsyncOpenAI(base_url=judge.url, api_key=key, timeout=judge.deadline_s, max_retries=3)
