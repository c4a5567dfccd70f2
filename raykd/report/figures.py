"""The figures of the page: which numbers, under which title, with which key."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raykd.report import meanings
from raykd.report.charts import Look, Point, curves, stacked
from raykd.report.folders import Numbers, RunLog
from raykd.report.meanings import HELD_OUT, LOSS_PREFIX, NOT_SHOWN, VERBS, Meaning, Section
from raykd.usage import LANES, shares

TIMES = ("seconds/", "tokens/", "waiting/")
"""Shown by ``time_figures``."""
STEPS = "optimiser steps"
Looks = Mapping[str, Look]
Series = dict[str, list[Point]]
"""The points of every run, or of every stage of one."""


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a figure's key."""

    name: str
    look: Look
    note: str
    """The last value, or a total."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its words."""

    title: str
    svg: str
    look: str
    """What to look for."""
    keys: Sequence[Key]

    @property
    def spoken(self) -> str:
        """For those who cannot see it."""
        return f"{self.title}. " + ", ".join(f"{key.name}: {key.note}" for key in self.keys)


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    return {name: Look.of(index) for index, name in enumerate(names)}


def number(value: float) -> str:
    """Three digits, all of a larger whole number."""
    if value == 0 or 999.5 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def held_out_figures(runs: Sequence[RunLog], looks: Looks) -> list[Figure]:
    """One for each held-out measure; those without a description come last."""
    found = _changing({run.name: run.held_out for run in runs})
    described = [name for name in HELD_OUT.metrics if name in found]
    boundaries = _boundaries(runs)
    return [
        _figure(HELD_OUT.metrics.get(name, Meaning(name, "", "")), found[name], looks, boundaries, dots=True)
        for name in dict.fromkeys([*described, *found])
    ]


def kl_against_time(runs: Sequence[RunLog], looks: Looks) -> list[Figure]:
    """What an hour buys: held-out reverse KL, or cross-entropy where there is no teacher, over wall time."""
    for name in ("reverse_kl", "loss"):
        lines = {run.name: [line for line in run.held_out if math.isfinite(line.get(name, math.nan))] for run in runs}
        series = {run: [(line["elapsed_seconds"] / 60, line[name]) for line in found] for run, found in lines.items() if found}
        if series:
            meaning = HELD_OUT.metrics[name]
            look = "The same numbers over wall time, measuring included: which run gets there first."
            timed = Meaning(f"{meaning.title}, over time", meaning.unit, look, meaning.may_be_log)
            return [_figure(timed, series, looks, dots=True, x="minutes")]
    return []


def step_figures(runs: Sequence[RunLog], looks: Looks) -> list[tuple[Section, list[Figure]]]:
    """The metrics of the optimiser steps that change, by section."""
    found = _changing({run.name: _step_numbers(run) for run in runs})
    boundaries = _boundaries(runs)
    by_section: dict[str, list[Figure]] = {}
    for name in sorted(found, key=meanings.rank):
        section, meaning = meanings.find(name)
        by_section.setdefault(section.title, []).append(_figure(meaning, found[name], looks, boundaries))
    return [(section, by_section[section.title]) for section in meanings.SECTIONS if section.title in by_section]


def constants(runs: Sequence[RunLog]) -> dict[str, str]:
    """The metrics of the steps that are the same in every run at every step: title -> value."""
    found = _series({run.name: _step_numbers(run) for run in runs})
    values = {name: {y for points in series.values() for _, y in points} for name, series in found.items()}
    return {meanings.find(name)[1].title: number(*only) for name, only in values.items() if len(only) == 1}


def time_figures(run: RunLog) -> list[Figure]:
    """Where a run's time goes: seconds of each stage in a step, and its tokens per second."""
    verbs = verbs_of(run)
    looks = looks_of(list(dict.fromkeys([*VERBS, *verbs])))
    parts = {verb: [(line["step"], line.get(f"seconds/{verb}", 0.0)) for line in run.steps] for verb in verbs if verb != "wait"}
    rates = {verb: [(line["step"], rate) for line in run.steps if (rate := _rate(line, verb))] for verb in verbs}
    rates = {verb: points for verb, points in rates.items() if points}
    figures = []
    if parts:
        keys = [Key(verb, Look(looks[verb].colour, ()), f"{number(sum(y for _, y in parts[verb]))} s") for verb in parts]
        look = "The tallest part is what to speed up. Stages that overlap can add up to more than the step took."
        figures.append(Figure(f"Seconds per step: {run.name}", stacked(parts, looks, x=STEPS, y="seconds per step"), look, keys))
    worked = {lane: [(line["step"], shares(line)[lane]) for line in run.steps if lane in shares(line)] for lane in LANES}
    if worked := {lane: points for lane, points in worked.items() if points}:
        look = "Who is near 1 holds the others up: give it replicas or ranks, make a reward cheaper, or let the others work "
        look += "ahead (max_staleness)."
        meaning = Meaning(f"Share of the time that each worked: {run.name}", "share", look)
        figures.append(_figure(meaning, worked, looks_of(list(worked))))
    if rates:
        look = "Response tokens of each stage, in the time that it worked."
        meaning = Meaning(f"Tokens per second: {run.name}", "tokens per second", look, may_be_log=True)
        figures.append(_figure(meaning, rates, looks))
    return figures


def verbs_of(run: RunLog) -> list[str]:
    """The stages that a run timed, in the order of the loop."""
    names = {name.removeprefix("seconds/") for line in run.steps for name in line if name.startswith("seconds/")}
    return [*(verb for verb in VERBS if verb in names), *sorted(names - set(VERBS))]


def _rate(line: Numbers, verb: str) -> float:
    seconds = line.get(f"seconds/{verb}", 0.0)
    return line.get(f"tokens/{verb}", 0.0) / seconds if seconds else 0.0


def _figure(
    meaning: Meaning, series: Series, looks: Looks, boundaries: Sequence[float] = (), *, dots: bool = False, x: str = STEPS
) -> Figure:
    svg = curves(series, looks, x=x, y=meaning.unit, boundaries=boundaries, may_be_log=meaning.may_be_log, dots=dots)
    keys = [Key(name, looks[name], f"ends at {number(points[-1][1])}") for name, points in series.items()]
    return Figure(meaning.title, svg, meaning.look, keys)


def _boundaries(runs: Sequence[RunLog]) -> list[float]:
    """Between the stages that have been reached."""
    return sorted({span.first - 0.5 for run in runs for span in run.spans if 1 < span.first <= run.last_step})


def _step_numbers(run: RunLog) -> list[Numbers]:
    """The steps as they are shown: the loss under its algorithm's name."""
    found = []
    for line in run.steps:
        loss = {f"{LOSS_PREFIX}{run.span_at(line['step']).algorithm}": line["loss"]} if "loss" in line else {}
        others = {name: y for name, y in line.items() if name != "loss" and not name.startswith(TIMES)}
        found.append(others | loss)
    return found


def _series(lines: Mapping[str, Sequence[Numbers]]) -> dict[str, Series]:
    """Metric -> run -> finite points."""
    found: dict[str, Series] = {}
    for run, of_run in lines.items():
        for line in of_run:
            for name, value in line.items():
                if name not in NOT_SHOWN and math.isfinite(value):
                    found.setdefault(name, {}).setdefault(run, []).append((line["step"], value))
    return found


def _changing(lines: Mapping[str, Sequence[Numbers]]) -> dict[str, Series]:
    found = _series(lines)
    return {name: series for name, series in found.items() if len({y for points in series.values() for _, y in points}) > 1}
