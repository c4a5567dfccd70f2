"""What a run directory or an evaluation holds. Runs that are going on, stopped or are damaged are read as far as they go."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from raykd.algorithms import AnyAlgorithm
from raykd.evaluation.results import Results
from raykd.experiment import HIGHER_IS_BETTER
from raykd.tracking import read_lines
from raykd.usage import advice

Line = TypeVar("Line", bound=BaseModel)
Numbers = dict[str, float]
EVALUATION = "evaluation.json"
ALGORITHMS = {kind.model_fields["kind"].default: kind.__name__ for kind in get_args(get_args(AnyAlgorithm)[0])}
HELD_OUT = "heldout/"


class Sample(BaseModel):
    """A line of ``samples.jsonl``: what the student answered after so many steps, beside the teacher and the reference."""

    model_config = ConfigDict(frozen=True)

    step: int
    prompt: str
    student: str
    teacher: str | None = None
    reference: str | None = None


class Answer(BaseModel):
    """A line of ``*.answers.jsonl``, as ``raykd evaluate`` writes it."""

    model_config = ConfigDict(frozen=True)

    suite: str
    row: int
    model: str
    seed: int
    text: str
    references: tuple[str, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The optimiser steps of a stage, counted over the run."""

    algorithm: str
    first: int
    last: int
    keep: str
    """Which of its weights went on: the last, or the best by a held-out number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """Everything that a run has written."""

    name: str
    settings: dict[str, str]
    """Every field of the experiment by its dotted name, then code revision and library versions."""
    spans: tuple[Span, ...]
    steps: list[Numbers]
    """One entry a step, in order. Beside what was logged: ``step_seconds``, the step's wall time, and ``elapsed_seconds``."""
    held_out: list[Numbers]
    """As ``steps``; names are without ``heldout/``."""
    samples: list[Sample]
    finished: bool
    written: datetime | None
    """When the last numbers came."""
    advice: str
    """What held the run up; empty where its times do not say."""
    notices: list[str]
    """What a reader should know before trusting the page."""

    @property
    def num_steps(self) -> int:
        """Steps that the experiment asks for."""
        return self.spans[-1].last

    @property
    def last_step(self) -> int:
        return int(max((line["step"] for line in [*self.steps, *self.held_out]), default=0))

    @property
    def best(self) -> Numbers | None:
        """The held-out numbers of the weights that the stage last measured keeps; None where it keeps the last."""
        if not self.held_out:
            return None
        span = self.span_at(self.held_out[-1]["step"])
        of_stage = [line for line in self.held_out if span.first <= line["step"] <= span.last]
        measured = [line for line in of_stage if math.isfinite(line.get(span.keep, math.nan))]
        choose = max if span.keep in HIGHER_IS_BETTER else min
        return choose(measured, key=lambda line: line[span.keep], default=None)

    def span_at(self, step: float) -> Span:
        """The stage that took a step."""
        return next((span for span in self.spans if step <= span.last), self.spans[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationLog:
    """One file of results, with the answers beside it."""

    name: str
    results: Results
    answers: list[Answer]
    notice: str
    """What of the answers cannot be read; empty where all can."""


def read(path: Path) -> tuple[RunLog | None, list[EvaluationLog]]:
    """A run directory, a model folder with ``evaluation.json``, or such a file; raises ValueError for anything else."""
    if path.is_file():
        return None, [read_evaluation(path)]
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder or file; give a run directory, or the results of raykd evaluate")
    found = [path / place / EVALUATION for place in ("", "student")]
    evaluations = [read_evaluation(file) for file in found if file.is_file()]
    if (path / "experiment.json").is_file():
        return read_run(path), evaluations
    if not evaluations:
        raise ValueError(f"{path} is no run directory: it has no experiment.json; nor has it an {EVALUATION}")
    return None, evaluations


def read_run(folder: Path) -> RunLog:
    """A run directory; raises ValueError where its experiment cannot be read."""
    path = folder / "experiment.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        spans = tuple(_spans(described["experiment"]["stages"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged and does not describe a run ({type(error).__name__}: {error})") from error
    metrics = folder / "metrics.jsonl"
    lines, unread = read_lines(metrics)
    steps, held_out = _by_step([line for line in lines if "step" in line])
    unread += sum("step" not in line for line in lines)
    samples, unread_samples = _validated(Sample, folder / "samples.jsonl")
    last = max(steps, default=0)
    finished = last >= spans[-1].last and (folder / "student").is_dir()
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None
    notices = [_damage(metrics.name, unread, finished), _damage("samples.jsonl", unread_samples, finished)]
    notices += [_progress(spans[-1].last, last, written)] if not finished else []
    notices += [_no_held_out(described["experiment"])] if not held_out else []
    return RunLog(
        name=folder.resolve().name,
        settings=_flat(described),
        spans=spans,
        steps=[steps[step] for step in sorted(steps)],
        held_out=[held_out[step] for step in sorted(held_out)],
        samples=samples,
        finished=finished,
        written=written,
        advice=_advice(folder, described["experiment"]["stages"], steps),
        notices=[notice for notice in [*notices, *_not_finite(steps)] if notice],
    )


def read_evaluation(path: Path) -> EvaluationLog:
    """What ``raykd evaluate`` wrote; raises ValueError where it is something else."""
    try:
        results = Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is no result of raykd evaluate: {error.errors()[0]['msg']}") from error
    file = path.with_suffix(".answers.jsonl")
    answers, unread = _validated(Answer, file)
    return EvaluationLog(name=str(path), results=results, answers=answers, notice=_damage(file.name, unread, finished=True))


def _spans(stages: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    if not stages:
        raise ValueError("it has no stages")
    first = 1
    for stage in stages:
        kind = stage["algorithm"]["kind"]
        last = first + stage["steps"] - 1
        yield Span(algorithm=ALGORITHMS.get(kind, kind), first=first, last=last, keep=stage.get("keep", "last"))
        first += stage["steps"]


def _validated(kind: type[Line], path: Path) -> tuple[list[Line], int]:
    lines, unread = read_lines(path)
    found = []
    for line in lines:
        try:
            found.append(kind.model_validate(line))
        except ValidationError:
            unread += 1
    return found, unread


def _by_step(lines: Sequence[Numbers]) -> tuple[dict[int, Numbers], dict[int, Numbers]]:
    """Steps and held-out numbers. A resumed run does some steps again: the later line of a step counts, the time of both."""
    steps: dict[int, Numbers] = {}
    held_out: dict[int, Numbers] = {}
    elapsed = before = 0.0
    for line in lines:
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        now = numbers.get("seconds", before)
        took = now - before if now >= before else now  # the clock starts again with every start of the run
        before, elapsed = now, elapsed + took
        step = int(numbers["step"])
        numbers = {name: value for name, value in numbers.items() if name != "seconds"} | {"elapsed_seconds": elapsed}
        if any(name.startswith(HELD_OUT) for name in numbers):
            held_out[step] = {name.removeprefix(HELD_OUT): value for name, value in numbers.items()}
        else:
            steps[step] = numbers | {"step_seconds": took}
    return steps, held_out


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": "1"}``; the experiment's own fields carry no prefix."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        prefix = "" if name in ("", "experiment") else f"{name}."
        return {key: text for part, inner in items for key, text in _flat(inner, f"{prefix}{part}").items()}
    return {name: value if isinstance(value, str) else json.dumps(value)}


def _damage(name: str, unread: int, finished: bool) -> str:
    reason = "" if finished else "; a run that is going on may be in the middle of one"
    return f"{unread} unreadable line{'s' * (unread > 1)} of {name} left out{reason}." if unread else ""


def _progress(num_steps: int, last: int, written: datetime | None) -> str:
    if written is None:
        return "No step has been logged yet: there is no metrics.jsonl."
    return f"Not finished: at step {last} of {num_steps}; the last numbers came at {written:%Y-%m-%d %H:%M} UTC."


def _advice(folder: Path, stages: Sequence[Mapping[str, Any]], steps: Mapping[int, Numbers]) -> str:
    if not any("seconds/wait" in line for line in steps.values()):
        return ""
    ahead, in_flight = ([stage.get(name, 0) for stage in stages] for name in ("max_staleness", "in_flight"))
    return advice(folder, max(ahead), any(in_flight))


def _no_held_out(experiment: Mapping[str, Any]) -> str:
    asked = experiment.get("evaluation", {}).get("prompts", 0)
    return "No held-out numbers" + (" yet." if asked else ": evaluation.prompts is 0. Training numbers alone can mislead.")


def _not_finite(steps: Mapping[int, Numbers]) -> Iterator[str]:
    found: dict[str, list[int]] = {}
    for step, numbers in sorted(steps.items()):
        for name, value in numbers.items():
            if not math.isfinite(value):
                found.setdefault(name, []).append(step)
    for name, where in found.items():
        yield f"{name} is not finite at {len(where)} step{'s' * (len(where) > 1)}, first at {where[0]}; left out of the curves."
