"""The protocol: every model answers every suite once a seed, the answers are measured, the numbers stand side by side.

suites -> question sets -> generate -> answers -> measures          an engine a model, in a process of its own
                references, answers -> likelihood            model and teacher, in a process of their own
                                    -> judge, harness
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field
from rich.console import Console

from raykd.evaluation.generate import Decoding, in_own_process, write
from raykd.evaluation.harness import check_harness, run_harness
from raykd.evaluation.judge import Case, Judge, check_judge, judge_answers, summary
from raykd.evaluation.likelihood import Likelihoods, Texts, score
from raykd.evaluation.measures import on_answers
from raykd.evaluation.question_sets import QuestionSet, ask_all, share_ids
from raykd.evaluation.results import Measured, ModelResults, Results, SuiteResults
from raykd.evaluation.suites import LabelSuite, Question, Suite
from raykd.experiment import EngineConfig, TeacherConfig
from raykd.records import Rollout
from raykd.rollout.config import EngineSettings
from raykd.tracking import say
from raykd.value import Value

T = TypeVar("T")


class Evaluation(Value):
    """Which models answer what, and how."""

    models: tuple[str, ...] = Field(min_length=1)
    """Hugging Face folders, run directories, or names on the Hub."""
    teacher: str | None = None
    """Answers like the others, and the others are compared with it, so it must share their tokenizer."""
    suites: tuple[Suite | LabelSuite, ...] = Field(min_length=1)
    decoding: Decoding = Decoding()
    max_prompt: int | None = Field(default=None, ge=1)
    """Longest prompt, tokens; longer ones are left out. None: what a model's context leaves beside the answer."""
    engine: EngineConfig = EngineConfig(deadline_s=86400.0)
    judge: Judge | None = None
    harness_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness."""

    @property
    def everyone(self) -> tuple[str, ...]:
        """The teacher first."""
        return tuple(dict.fromkeys((*([self.teacher] if self.teacher else []), *self.models)))

    @property
    def free(self) -> tuple[Suite, ...]:
        """The suites that are answered in free text."""
        return tuple(suite for suite in self.suites if isinstance(suite, Suite))

    def named(self, name: str) -> Suite:
        return next(suite for suite in self.free if suite.name == name)


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model wrote: suite -> seed -> row."""

    rollouts: dict[str, list[list[Rollout]]]
    texts: dict[str, list[list[str]]]


def evaluate(evaluation: Evaluation, console: Console, keep: Callable[[list[dict[str, Any]]], None]) -> Results:
    """The results. Each model's answers, as rows, go to ``keep`` as soon as they are written, before anything is measured.
    Raises ValueError for what can be known to be wrong before a model starts."""
    question_sets, left_out = ask_all(evaluation.everyone, evaluation.suites, evaluation.max_prompt)
    if evaluation.teacher:
        question_sets = share_ids(question_sets, evaluation.teacher)
    _check(evaluation)

    def each(what: str, do: Callable[[str], T]) -> dict[str, T]:
        found = {}
        for model in question_sets:
            say(console, f"{model} {what}")
            found[model] = do(model)
        return found

    tasks, dtype = evaluation.harness_tasks, evaluation.engine.dtype
    by_harness = {}
    if tasks:
        by_harness = each("runs the harness", lambda m: in_own_process(run_harness, question_sets[m].folder, tasks, dtype))

    def answers_of(model: str) -> Answers:
        answers = answer(evaluation, question_sets[model])
        keep(rows_of(evaluation, model, question_sets[model], answers))
        return answers

    written = each("answers", answers_of)
    measured = each("is measured", lambda model: measure(evaluation, model, question_sets, written))
    suites = {
        suite.name: SuiteResults(
            rows=len(question_sets[evaluation.everyone[0]].rows(suite.name)),
            left_out=left_out[suite.name],
            models={model: found[suite.name] for model, found in measured.items()},
        )
        for suite in evaluation.suites
    }
    return Results(protocol=evaluation.model_dump(mode="json"), suites=suites, harness=by_harness)


def answer(evaluation: Evaluation, question_set: QuestionSet) -> Answers:
    """One model's answers to all suites, all seeds together."""
    if not evaluation.free:
        return Answers({}, {})
    asked = [(question.prompt, suite.max_tokens) for suite in evaluation.free for question in question_set.free[suite.name]]
    engine = EngineSettings(
        max_length=max(len(prompt.tokens) + limit for prompt, limit in asked),
        vocab_size=question_set.vocab_size,
        **evaluation.engine.model_dump(),
    )
    seeds = in_own_process(write, question_set.folder, engine, evaluation.decoding, question_set.eos_ids, asked)
    rollouts, start = {}, 0
    for suite in evaluation.free:
        stop = start + len(question_set.free[suite.name])
        rollouts[suite.name] = [seed[start:stop] for seed in seeds]
        start = stop
    return Answers(rollouts, {suite: question_set.texts(answers) for suite, answers in rollouts.items()})


def measure(
    evaluation: Evaluation, model: str, question_sets: Mapping[str, QuestionSet], written: Mapping[str, Answers]
) -> dict[str, ModelResults]:
    """Everything about one model, suite by suite; the judge rates the answers of the first seed."""
    question_set, texts = question_sets[model], written[model].texts
    teacher = written[evaluation.teacher].texts if evaluation.teacher and model != evaluation.teacher else {}
    results = {}
    for suite, found in likelihoods(evaluation, model, question_sets, written).items():
        measures = {name: Measured(values=values) for name, values in found.measures.items()}
        if asked := question_set.free.get(suite):
            answers = on_answers(evaluation.named(suite), asked, written[model].rollouts[suite], texts[suite], teacher.get(suite))
            measures = answers | measures | _opinion(evaluation, question_set.prompts(suite), texts[suite][0], asked)
        results[suite] = ModelResults(measures=measures, excess_error=found.excess_error)
    return results


def likelihoods(
    evaluation: Evaluation, model: str, question_sets: Mapping[str, QuestionSet], written: Mapping[str, Answers]
) -> dict[str, Likelihoods]:
    """Test loss, KL to the teacher and calibration of one model."""
    question_set, teacher = question_sets[model], evaluation.teacher if model != evaluation.teacher else None
    texts = {
        name: Texts(
            references=[Rollout.reference(question.prompt) for question in asked],
            own=written[model].rollouts[name],
            teachers=written[teacher].rollouts[name] if teacher else [],
        )
        for name, asked in question_set.free.items()
    }
    config = TeacherConfig(dtype=evaluation.engine.dtype)
    guide = question_sets[teacher].folder if teacher else None
    return in_own_process(score, question_set.folder, guide, config, question_set.vocab_size, texts, question_set.labelled)


def _opinion(
    evaluation: Evaluation, prompts: Sequence[str], texts: Sequence[str], asked: Sequence[Question]
) -> dict[str, Measured]:
    if evaluation.judge is None:
        return {}
    rows = zip(prompts, texts, asked, strict=True)
    verdicts = judge_answers(evaluation.judge, [Case(prompt, text, question.references[0]) for prompt, text, question in rows])
    return {name: Measured(values=(value,)) for name, value in summary(verdicts).items()}


def rows_of(evaluation: Evaluation, model: str, question_set: QuestionSet, answers: Answers) -> list[dict[str, Any]]:
    """Every answer with its question's row."""
    return [
        {
            "suite": suite,
            "row": question.row,
            "model": model,
            "seed": seed,
            "prompt": prompt,
            "text": text,
            "references": question.references,
        }
        for suite, asked in question_set.free.items()
        for seed, texts in zip(evaluation.decoding.seeds, answers.texts[suite], strict=True)
        for question, prompt, text in zip(asked, question_set.prompts(suite), texts, strict=True)
    ]


def _check(evaluation: Evaluation) -> None:
    if evaluation.judge:
        check_judge(evaluation.judge)
    if evaluation.harness_tasks:
        check_harness()
