"""The pairs of teacher and student that are compared, each with what it takes to make and to measure them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import small_dolly
import stories

from raykd.algorithms import SFT, AnyAlgorithm
from raykd.evaluation.generate import Decoding
from raykd.evaluation.suites import Question, Suite, questions
from raykd.experiment import Experiment
from raykd.run import prepare
from raykd.sources import Pairs, read_rows

TEACHER, START = "teacher", "start"
TEACHER_TEXT, TEXT = "teacher_text", "text"
"""What teacher and student are before they follow instructions."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pair:
    """A teacher and a student."""

    experiment: Callable[[AnyAlgorithm, int], Experiment]
    """Of a method, and how often it measures: fine-tuning, then the method."""
    suite: Suite
    """What every finished student answers; Rouge-L, length and diversity."""
    questions: Callable[["Pair", Any], list[Question]]
    """The suite's, of pair and tokenizer: no run trains on them."""
    decoding: Decoding
    level: float
    """The reverse KL that is to be reached."""
    teacher: str | None = None
    """Where it is; None: it is made, too."""
    made: Mapping[str, Experiment] = field(default_factory=dict)
    """What must be trained before the fine-tuning, from random weights or from the one before."""

    def setting(self) -> Experiment:
        """Data and lengths, the same for every run."""
        return self.experiment(SFT(), 0).model_copy(update={"text": None})


def _of_stories(pair: Pair, tokenizer: Any) -> list[Question]:
    """The stories that every run holds out."""
    held_out = prepare(pair.setting(), tokenizer).held_out
    return [
        Question(row, prompt, (str(tokenizer.decode(list(prompt.response))),), len(prompt.response) - prompt.finished)
        for row, prompt in enumerate(held_out)
    ]


def _of_suite(pair: Pair, tokenizer: Any) -> list[Question]:
    return questions(pair.suite, read_rows(pair.suite.data), tokenizer, pair.setting().max_prompt)


def _stories(size: str, level: float) -> Pair:
    return Pair(
        experiment=partial(stories.stories, size=size),
        suite=Suite(name="stories", data=Pairs(path="")),
        questions=_of_stories,
        decoding=Decoding(seeds=(10, 20, 30, 40)),
        level=level,
        teacher=stories.TEACHER,
    )


PAIRS: Mapping[str, Pair] = {
    "fifth": _stories("fifth", level=1.6),
    "half": _stories("half", level=1.3),
    "dolly": Pair(
        experiment=small_dolly.small_dolly,
        suite=Suite(
            name="dolly",
            data=small_dolly.DOLLY.model_copy(update={"path": small_dolly.TEST}),
            max_tokens=small_dolly.MAX_RESPONSE,
        ),
        questions=_of_suite,
        decoding=Decoding(seeds=(10, 20, 30)),
        level=0.35,
        made={
            TEACHER_TEXT: small_dolly.reading(small_dolly.TEACHER, 350, 3e-3),
            TEACHER: small_dolly.following(small_dolly.TEACHER, 250, 1e-3),
            TEXT: small_dolly.reading(small_dolly.STUDENT, 150, 5e-3),
        },
    ),
}
