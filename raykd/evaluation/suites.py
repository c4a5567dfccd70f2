"""What a model is asked: rows, prompt, accepted answers, and what counts as a good one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from raykd.prompts import Prompts
from raykd.records import Prompt
from raykd.sources import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, LOADERS, Pairs, Row, Rows
from raykd.tokenise import tokenise
from raykd.value import Value


class Metric(StrEnum):
    """What a suite measures beside Rouge-L, lengths and diversity."""

    ROUGE = "rouge"
    """Nothing."""
    BLEU = "bleu"
    EXACT_MATCH = "exact_match"
    """Whether the answer's last number is the right one."""


class _Suite(Value):
    name: str
    data: Pairs


class Suite(_Suite):
    """Questions to be answered in free text."""

    references: str | None = None
    """Field with the accepted answers, one text or a list of texts; None: ``data.response`` is the only one."""
    metric: Metric = Metric.ROUGE
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""

    @model_validator(mode="after")
    def _has_a_reference(self) -> Self:
        if self.data.response is None:
            raise ValueError(
                f"suite {self.name}: data.response is not set; give a template of the reference answer, e.g. '{{answer}}'"
            )
        return self


class LabelSuite(_Suite):
    """Questions with one of a few words for an answer: accuracy and calibration of the words' likelihoods."""

    label: str = "label"
    """Field with the index of the right word."""
    words: tuple[str, ...] = Field(min_length=2)
    max_tokens: int = Field(default=16, ge=1)
    """Longest word."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row of a suite, tokenised; the prompt carries ``data.response`` as its response, cut at ``max_tokens``."""

    row: int
    prompt: Prompt
    references: tuple[str, ...]
    """The accepted answers, whole."""
    reference_length: int
    """Tokens of the first one, EOS not counted."""


@dataclass(frozen=True, slots=True)
class LabelQuestion:
    """A row of a label suite: its prompt continued with each word in turn."""

    row: int
    prompts: tuple[Prompt, ...]
    label: int


def questions(
    suite: Suite, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_prompt: int, eos_ids: Sequence[int] = ()
) -> list[Question]:
    """The rows whose prompt has at most ``max_prompt`` tokens; raises ValueError naming the suite when there is none. ``eos_ids``
    end an answer, by default the tokenizer's EOS does."""
    prompts = _tokenise(suite, rows, suite.data, tokenizer, max_prompt, eos_ids)
    return [_question(suite, rows[_row(prompt)], prompt, tokenizer) for prompt in prompts]


def label_questions(
    suite: LabelSuite, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_prompt: int, eos_ids: Sequence[int] = ()
) -> list[LabelQuestion]:
    """As ``questions``; each word is tokenised as the continuation of the prompt."""
    words = [
        _tokenise(suite, rows, suite.data.model_copy(update={"response": word}), tokenizer, max_prompt, eos_ids)
        for word in suite.words
    ]
    asked = [LabelQuestion(_row(row[0]), row, rows[_row(row[0])].get(suite.label, -1)) for row in zip(*words, strict=True)]
    if wrong := [question for question in asked if question.label not in range(len(suite.words))]:
        raise ValueError(
            f"suite {suite.name}, row {wrong[0].row + 1}: {suite.label} is {wrong[0].label!r}, "
            f"which is no index into its words {', '.join(suite.words)}"
        )
    return asked


def find_suites(names: str, others: Suite) -> tuple[Suite | LabelSuite, ...]:
    """``dolly,./mine.jsonl,owner/data@test`` -> suites; files and Hub data sets get the templates and metric of ``others``.

    Built-in suites are read from the folder ``data`` of the one that RAYKD_DATA names. Raises ValueError for an unknown name.
    """
    return tuple(_find(name.strip(), others) for name in names.split(",") if name.strip())


def _find(name: str, others: Suite) -> Suite | LabelSuite:
    known = {suite.name: suite for suite in BUILT_IN}
    if name in known:
        suite = known[name]
        path = Path(os.environ.get("RAYKD_DATA", "../shared")) / "data" / suite.data.path
        if not path.exists():
            raise ValueError(
                f"suite {name}: {path} does not exist; set RAYKD_DATA to the folder that holds data/, or give a file"
            )
        return suite.model_copy(update={"data": suite.data.model_copy(update={"path": str(path)})})
    if "/" not in name and Path(name.removesuffix(".gz")).suffix not in LOADERS:
        raise ValueError(
            f"suite {name} is not known; choose from {', '.join(known)}, "
            "or give a file (.jsonl) or a Hub data set (owner/name@split)"
        )
    path, _, split = name.partition("@")
    all_of_it = "train" if Path(path).is_file() else "test"
    data = others.data.model_copy(update={"path": path, "split": split or all_of_it})
    return others.model_copy(update={"name": name, "data": data})


def _question(suite: Suite, row: Row, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Question:
    references = _accepted(suite, row, _row(prompt))
    length = len(tokenizer(references[0], add_special_tokens=False)["input_ids"])
    return Question(row=_row(prompt), prompt=prompt, references=references, reference_length=length)


def _accepted(suite: Suite, row: Row, index: int) -> tuple[str, ...]:
    if suite.references is None:
        assert suite.data.response is not None
        return (suite.data.response.format_map(row),)
    accepted = row.get(suite.references)
    if not accepted:
        raise ValueError(f"suite {suite.name}, row {index + 1}: no accepted answer in the field {suite.references!r}")
    return (accepted,) if isinstance(accepted, str) else tuple(accepted)


def _tokenise(
    suite: Suite | LabelSuite,
    rows: Rows,
    data: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt: int,
    eos_ids: Sequence[int],
) -> Prompts:
    try:
        return tokenise(rows, data, tokenizer, max_prompt=max_prompt, max_response=suite.max_tokens, eos_ids=eos_ids)
    except ValueError as error:
        raise ValueError(f"suite {suite.name}: {error}") from error


def _row(prompt: Prompt) -> int:
    return int(prompt.id.rpartition(":")[2])


def _alpaca(path: str, **fields: str) -> Pairs:
    """MiniLLM's prompt; ``fields`` takes the place of an instruction or input that the rows do not have."""
    given = {"instruction": "{instruction}", "input": "{input}"} | fields
    without_input = None if "input" in fields else ALPACA_WITHOUT_INPUT.format_map(given)
    return Pairs(path=path, prompt=ALPACA_WITH_INPUT.format_map(given), prompt_without_input=without_input, response="{output}")


ALPACA = _alpaca("")
"""The templates for rows with ``instruction``, ``input`` and ``output``."""

TRANSLATE = "Translate the following German sentence into English."
SENTIMENT = "Determine the sentiment of the input sentence. Please respond as positive or negative."

BUILT_IN: tuple[Suite | LabelSuite, ...] = (
    Suite(name="dolly", data=_alpaca("dolly/test.jsonl")),
    Suite(name="self_inst", data=_alpaca("self_inst/test.jsonl")),
    Suite(name="vicuna", data=_alpaca("vicuna/test.jsonl")),
    Suite(name="dialogsum", data=_alpaca("dialogsum/test.jsonl"), references="outputs"),
    Suite(name="gsm8k", data=_alpaca("gsm8k/test.jsonl"), references="answer", metric=Metric.EXACT_MATCH),
    Suite(
        name="multi30k",
        data=_alpaca("multi30k/test2016.jsonl", instruction=TRANSLATE, input="{de}").model_copy(update={"response": "{en}"}),
        metric=Metric.BLEU,
    ),
    LabelSuite(
        name="sst2", data=_alpaca("sst2/test.jsonl", instruction=SENTIMENT, input="{text}"), words=("negative", "positive")
    ),
    LabelSuite(
        name="boolq",
        data=Pairs(
            path="boolq/test.jsonl",
            prompt=ALPACA_WITHOUT_INPUT.format(instruction='Answer the question with "Yes" or "No": {question}'),
            response=None,
        ),
        words=("No", "Yes"),
    ),
)
"""Paths are within the data folder. BoolQ is asked without its passages."""
