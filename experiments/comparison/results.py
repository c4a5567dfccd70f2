"""What the runs of the comparison left: curves, measures, and their statistics over seeds."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from comparison.pairs import TEACHER
from comparison.plan import Entry
from raykd.evaluation.results import Results
from raykd.report.folders import EVALUATION
from raykd.tracking import read_lines

BUSY = ("wait", "learn", "publish")
"""What a step's time consists of, as the loop sees it; start-up and held-out measures are not in it."""
HELD_OUT = ("loss", "forward_kl", "reverse_kl")


@dataclass(frozen=True, slots=True)
class Point:
    """A held-out measurement within a run."""

    step: float
    seconds: float
    """CPU time of training so far."""
    tokens: float
    """Response tokens learned from so far, a token of several epochs as often."""
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished run."""

    entry: Entry
    curve: Sequence[Point]
    measures: Mapping[str, float]
    excess_error: Sequence[float]
    gradient_norms: Sequence[float]

    @property
    def seconds(self) -> float:
        return self.curve[-1].seconds

    def at_seconds(self, seconds: float, name: str) -> float | None:
        """A held-out value after so much training, between two measurements on the line; None where the run is more than
        a tenth shorter."""
        if seconds > 1.1 * self.seconds:
            return None
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            if seconds <= after.seconds or after is self.curve[-1]:
                part = min(1.0, (seconds - before.seconds) / (after.seconds - before.seconds))
                return before.values[name] + part * (after.values[name] - before.values[name])
        raise AssertionError("a curve has at least two points")

    def reaches(self, name: str, level: float) -> tuple[float, float] | None:
        """Seconds and tokens until a held-out value has fallen to ``level``; None where it never does."""
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            first, second = before.values[name], after.values[name]
            if second <= level:
                part = 0.0 if first <= level else (first - level) / (first - second)
                return before.seconds + part * (after.seconds - before.seconds), before.tokens + part * (
                    after.tokens - before.tokens
                )
        return None


def read_outcome(entry: Entry, folder: Path) -> Outcome:
    """A run directory with its evaluation.json; a teacher that was there before has no curve."""
    curves = folder / "metrics.jsonl"
    lines = read_lines(curves)[0] if curves.exists() and entry.variant != TEACHER else []
    (suite,) = Results.model_validate_json((folder / EVALUATION).read_text(encoding="utf-8")).suites.values()
    found = suite.models["student"]
    norms = list({line["step"]: line["grad_norm"] for line in lines if "grad_norm" in line}.values())
    measures = {name: measured.mean for name, measured in found.measures.items()}
    return Outcome(entry, curve_of(lines), measures, found.excess_error, norms)


def curve_of(lines: Iterable[Mapping[str, float]]) -> list[Point]:
    """The held-out measurements of a ``metrics.jsonl`` over training time and tokens; steps that a resumed run did again count
    as they were done last."""
    points: list[Point] = []
    seconds = tokens = 0.0
    last = {(line["step"], "heldout/loss" in line): line for line in lines}
    for _, line in sorted(last.items(), key=lambda item: item[0]):
        seconds += sum(line.get(f"seconds/{verb}", 0.0) for verb in BUSY)
        tokens += line.get("tokens/learn", 0.0)
        if "heldout/loss" in line:
            points.append(Point(line["step"], seconds, tokens, {name: line[f"heldout/{name}"] for name in HELD_OUT}))
    return points


@dataclass(frozen=True, slots=True)
class Spread:
    """A number for each seed."""

    by_seed: Mapping[int, float]

    @property
    def values(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def text(self, digits: int) -> str:
        if not self.values:
            return "-"
        spread = f" ± {math.sqrt(variance(self.values)):.{digits}f}" if len(self.values) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"

    def minus(self, other: "Spread") -> "Spread":
        """The differences of the seeds that both have."""
        return Spread({seed: value - other.by_seed[seed] for seed, value in self.by_seed.items() if seed in other.by_seed})


def over_seeds(outcomes: Iterable[Outcome], value: Callable[[Outcome], float | None]) -> Spread:
    """The values that there are."""
    return Spread({outcome.entry.seed: found for outcome in outcomes if (found := value(outcome)) is not None})


def noise(groups: Iterable[Spread]) -> float:
    """The standard deviation between seeds, pooled over the groups: sqrt(sum_k (n_k - 1) s_k^2 / sum_k (n_k - 1)); raises
    ValueError where no group has two."""
    several = [group.values for group in groups if len(group.values) > 1]
    if not several:
        raise ValueError("the noise is not known before some variant has run with two seeds")
    return math.sqrt(sum((len(v) - 1) * variance(v) for v in several) / sum(len(v) - 1 for v in several))
