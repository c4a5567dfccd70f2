"""What every model is asked, in its own tokens: the same rows for all, so that their numbers can stand side by side."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raykd.evaluation.suites import LabelQuestion, LabelSuite, Question, Suite, label_questions, questions
from raykd.pretrained import eos_ids, known_ids, load, load_config, locate, shared_ids
from raykd.records import Rollout
from raykd.sources import Rows, read_rows


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one model, by suite."""

    folder: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    """Ids that its distributions run over."""
    eos_ids: tuple[int, ...]
    """Those that end its answers."""
    free: dict[str, list[Question]]
    labelled: dict[str, list[LabelQuestion]]

    def rows(self, suite: str) -> set[int]:
        return {question.row for question in (self.free | self.labelled)[suite]}

    def keep(self, suite: str, rows: set[int]) -> None:
        if suite in self.free:
            self.free[suite] = [question for question in self.free[suite] if question.row in rows]
        else:
            self.labelled[suite] = [question for question in self.labelled[suite] if question.row in rows]

    def texts(self, seeds: Sequence[Sequence[Rollout]]) -> list[list[str]]:
        """For each seed the text of every answer."""
        return [self._decode([rollout.tokens for rollout in seed]) for seed in seeds]

    def prompts(self, suite: str) -> list[str]:
        return self._decode([question.prompt.tokens for question in self.free[suite]])

    def _decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode([list(tokens) for tokens in sequences], skip_special_tokens=True)


def ask_all(
    models: Sequence[str], suites: Sequence[Suite | LabelSuite], max_prompt: int | None
) -> tuple[dict[str, QuestionSet], dict[str, int]]:
    """The questions of each model, of the rows that fit all of them, and how many rows of each suite do not.

    Raises ValueError for whatever is missing or cannot work.
    """
    rows = {suite.name: read_rows(suite.data) for suite in suites}
    question_sets = {model: _question_set(model, suites, rows, max_prompt) for model in models}
    left_out = {}
    for suite in suites:
        common = set.intersection(*(question_set.rows(suite.name) for question_set in question_sets.values()))
        if not common:
            raise ValueError(f"suite {suite.name}: no row is short enough for all of {', '.join(models)}; lower max_tokens")
        for question_set in question_sets.values():
            question_set.keep(suite.name, common)
        left_out[suite.name] = len(rows[suite.name]) - len(common)
    return question_sets, left_out


def share_ids(question_sets: Mapping[str, QuestionSet], teacher: str) -> dict[str, QuestionSet]:
    """The same questions, every distribution over the ids that all models know; ValueError where one speaks other ids than the
    ``teacher``."""
    theirs = question_sets[teacher]
    vocab_size = theirs.vocab_size
    for ours in question_sets.values():
        if ours is not theirs:
            shared = shared_ids((ours.folder, f"the teacher {theirs.folder}"), (ours.tokenizer, theirs.tokenizer))
            vocab_size = min(vocab_size, ours.vocab_size, shared)
    return {model: replace(question_set, vocab_size=vocab_size) for model, question_set in question_sets.items()}


def _question_set(
    model: str, suites: Sequence[Suite | LabelSuite], rows: Mapping[str, Rows], max_prompt: int | None
) -> QuestionSet:
    tokenizer = load("model", model, AutoTokenizer)
    config, folder = load_config("model", model), locate("model", model)
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    vocab_size = known_ids(f"model {model}", tokenizer, config)
    question_set = QuestionSet(folder, tokenizer, vocab_size, eos_ids(folder, tokenizer), {}, {})
    for suite in suites:
        room = context - suite.max_tokens
        if room < 1:
            raise ValueError(f"suite {suite.name}: answers of {suite.max_tokens} tokens fill the context of {model}, {context}")
        longest = min(room, max_prompt or room)
        if isinstance(suite, Suite):
            question_set.free[suite.name] = questions(suite, rows[suite.name], tokenizer, longest, question_set.eos_ids)
        else:
            question_set.labelled[suite.name] = label_questions(suite, rows[suite.name], tokenizer, longest, question_set.eos_ids)
    return question_set
