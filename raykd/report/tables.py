"""The tables and cards of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raykd.evaluation.results import Measured
from raykd.report.charts import curves
from raykd.report.figures import Figure, Key, looks_of, number, verbs_of
from raykd.report.folders import EvaluationLog, RunLog, Sample
from raykd.report.meanings import HELD_OUT, MEASURES, NATS, VERBS

NUM_CARDS, NUM_MOMENTS = 6, 6
"""Prompts whose answers are shown, and moments of training for each."""
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    notes: Mapping[str, str]
    """What a row means."""


@dataclass(frozen=True, slots=True)
class Card:
    """Answers to one prompt: who said it -> the text."""

    prompt: str
    answers: Mapping[str, str]


def summary(runs: Sequence[RunLog]) -> Table:
    """Each run in a column: what it was, how far it came, what came of it."""
    columns = [_facts(run) for run in runs]
    rows = {fact: [column.get(fact, NOTHING) for column in columns] for fact in dict.fromkeys(f for c in columns for f in c)}
    return Table("", [run.name for run in runs], rows, {})


def time_table(run: RunLog) -> Table:
    """Seconds, share of the run's wall time and tokens per second of each stage."""
    wall = _elapsed(run)
    sums = {
        verb: [sum(line.get(f"{what}/{verb}", 0.0) for line in run.steps) for what in ("seconds", "tokens")]
        for verb in verbs_of(run)
    }
    rest = wall - sum(seconds for verb, (seconds, _) in sums.items() if verb != "wait")
    rows = {
        verb: [number(seconds), _share(seconds, wall), number(tokens / seconds) if tokens else NOTHING]
        for verb, (seconds, tokens) in sums.items()
    }
    if rest > 0:
        rows["everything else"] = [number(rest), _share(rest, wall), NOTHING]
    notes = {verb: VERBS.get(verb, "") for verb in rows} | {
        "everything else": "what is left of held-out measures and checkpoints"
    }
    return Table(f"{run.name}: {duration(wall)}", ["seconds", "of the time", "tokens per second"], rows, notes)


def settings(runs: Sequence[RunLog]) -> Table:
    """Every field of the experiments."""
    fields = dict.fromkeys(field for run in runs for field in run.settings)
    return Table(
        "", [run.name for run in runs], {field: [run.settings.get(field, NOTHING) for run in runs] for field in fields}, {}
    )


def differences(runs: Sequence[RunLog]) -> Table:
    """The fields that are not the same in all runs; of a stage that some do not have, none, but all stages in one row."""
    num_common = min((len(run.spans) for run in runs), default=0)
    alone = tuple(f"stages.{index}." for run in runs for index in range(num_common, len(run.spans)))
    rows = {"stages": [_stages(run) for run in runs]} if alone else {}
    rows |= {field: values for field, values in settings(runs).rows.items() if not field.startswith((*alone, "name"))}
    differing = {field: values for field, values in rows.items() if len(set(values)) > 1}
    return Table("", [run.name for run in runs], differing, {})


def evaluation_tables(evaluation: EvaluationLog) -> list[Table]:
    """A suite each, then the tasks of lm-evaluation-harness."""
    results = evaluation.results
    tables = []
    for name, suite in results.suites.items():
        left_out = f", {suite.left_out} left out as too long" if suite.left_out else ""
        measures = {model: of_model.measures for model, of_model in suite.models.items()}
        tables.append(_measures(f"{name}: {suite.rows} questions{left_out}", measures))
    for task in dict.fromkeys(task for tasks in results.harness.values() for task in tasks):
        found = {model: tasks.get(task, {}) for model, tasks in results.harness.items()}
        models = {model: {name: Measured(values=(value,)) for name, value in of.items()} for model, of in found.items()}
        tables.append(_measures(f"lm-evaluation-harness: {task}", models))
    return tables


def exposure_figures(evaluation: EvaluationLog) -> list[Figure]:
    """ExAccErr over length, where the models were compared with a teacher."""
    figures = []
    for name, suite in evaluation.results.suites.items():
        curves_of = {model: enumerate(of_model.excess_error, 1) for model, of_model in suite.models.items()}
        finite = {model: [(i, y) for i, y in curve if math.isfinite(y)] for model, curve in curves_of.items()}
        errors = {model: points for model, points in finite.items() if points}
        if errors:
            looks = looks_of(list(suite.models))
            svg = curves(errors, looks, x="answer length, tokens", y="percent")
            look = "ExAccErr: what the student's own prefixes cost beyond the teacher's. Near 0, there is no exposure bias."
            keys = [Key(model, looks[model], f"ends at {number(points[-1][1])}") for model, points in errors.items()]
            figures.append(Figure(f"Exposure bias: {name}", svg, look, keys))
    return figures


def evaluation_cards(evaluation: EvaluationLog) -> list[Card]:
    """The first questions of every suite, as every model answered them under the first seed."""
    cards: dict[tuple[str, int], dict[str, str]] = {}
    prompts = {}
    for answer in evaluation.answers:
        place = answer.suite, answer.row
        prompts.setdefault(place, answer.prompt or f"{answer.suite}, row {answer.row + 1}")
        answers = cards.setdefault(place, {"reference": answer.references[0]} if answer.references else {})
        answers.setdefault(answer.model, answer.text)
    suites = dict.fromkeys(suite for suite, _ in cards)
    shown = [place for suite in suites for place in [p for p in cards if p[0] == suite][:NUM_CARDS]]
    return [Card(prompts[place], cards[place]) for place in shown]


def sample_cards(samples: Sequence[Sample]) -> list[Card]:
    """The same prompts again and again: how the student's answers change."""
    by_prompt: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, {})[sample.step] = sample  # a resumed run does some steps again
    cards = []
    for prompt, by_step in list(by_prompt.items())[:NUM_CARDS]:
        steps = sorted(by_step)
        last = by_step[steps[-1]]
        teacher = next((by_step[step].teacher for step in steps if by_step[step].teacher is not None), None)
        given = {"reference": last.reference, "teacher": teacher}  # the teacher is frozen: it answers once
        student = {f"step {step}": by_step[step].student for step in _spread(steps, NUM_MOMENTS)}
        cards.append(Card(prompt, {who: text for who, text in given.items() if text is not None} | student))
    return cards


def duration(seconds: float) -> str:
    """``1 h 5 min``, ``3 min 20 s``, ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _facts(run: RunLog) -> dict[str, str]:
    of = run.settings
    student, teacher, data = (_end_of_path(of.get(f"{field}.path", NOTHING)) for field in ("student", "teacher", "data"))
    scratch = of.get("student.scratch.model_type")
    facts = {
        "state": "finished" if run.finished else f"at step {run.last_step} of {run.num_steps}",
        "teacher": teacher,
        "student": f"{scratch} from random weights, tokenizer of {student}" if scratch else student,
        "data": data,
        "stages": _stages(run),
    }
    best = run.best
    if best:
        facts["weights kept"] = f"of step {best['step']:.0f}, the best of their stage"
    for name, meaning in HELD_OUT.metrics.items():
        values = [line[name] for line in run.held_out if name in line]
        if values and meaning.unit == NATS:
            last = best.get(name, values[-1]) if best else values[-1]
            facts[f"{meaning.title}, {meaning.unit}"] = " → ".join(map(number, dict.fromkeys((values[0], last))))
    commit = of.get("code.commit", "")[:10] or "unknown"
    changed = ", with changes that were not committed" if of.get("code.modified") == "true" else ""
    return facts | {"wall time": duration(_elapsed(run)), "seed": of.get("seed", NOTHING), "code revision": commit + changed}


def _stages(run: RunLog) -> str:
    return "; then ".join(f"{span.algorithm}, {span.last - span.first + 1} steps" for span in run.spans)


def _end_of_path(path: str) -> str:
    parts = path.split("/")
    return path if len(parts) <= 3 else "…/" + "/".join(parts[-2:])


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else NOTHING


def _elapsed(run: RunLog) -> float:
    return max((line["elapsed_seconds"] for line in [*run.steps, *run.held_out]), default=0.0)


def _measures(title: str, models: Mapping[str, Mapping[str, Measured]]) -> Table:
    names = dict.fromkeys(name for measures in models.values() for name in measures)
    rows = {name: [str(measures.get(name, NOTHING)) for measures in models.values()] for name in names}
    notes = {name: MEASURES.get(name, "") for name in names}
    return Table(title, list(models), rows, notes)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
