"""What an evaluation found: JSON for programs, a table for people."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, computed_field
from rich.markup import escape
from rich.table import Table


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")  # ExAccErr can be infinite


class Measured(_Value):
    """One measure of one model on one suite: a value for each seed, or a single one where no seed matters."""

    values: tuple[float, ...] = Field(min_length=1)

    @computed_field
    @property
    def mean(self) -> float:
        return fmean(self.values)

    @computed_field
    @property
    def spread(self) -> float | None:
        """The sample standard deviation over seeds; None where there is none."""
        return stdev(self.values) if len(self.values) > 1 and all(map(isfinite, self.values)) else None

    def __str__(self) -> str:
        digits = 2 if abs(self.mean) >= 10 else 3
        return f"{self.mean:.{digits}f}" + ("" if self.spread is None else f" ± {self.spread:.{digits}f}")


class ModelResults(_Value):
    """One model on one suite."""

    measures: dict[str, Measured]
    excess_error: tuple[float, ...] = ()
    """ExAccErr(l) in percent, l = 1, 2, ..., of the answers of all seeds together; empty without a teacher."""


class SuiteResults(_Value):
    """Every model on one suite."""

    rows: int
    """Questions that every model answered."""
    left_out: int
    """Rows whose prompt is too long for one of the models."""
    models: dict[str, ModelResults]


class Results(_Value):
    """All suites, and how they were run."""

    protocol: dict[str, Any]
    suites: dict[str, SuiteResults]
    harness: dict[str, dict[str, dict[str, float]]] = {}
    """Model -> task of lm-evaluation-harness -> measure -> value."""

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2), encoding="utf-8")

    def tables(self) -> list[Table]:
        """One a suite: a row for each measure, a column for each model."""
        tables = [
            _table(f"{name}: {suite.rows} rows, {suite.left_out} left out", {m: r.measures for m, r in suite.models.items()})
            for name, suite in self.suites.items()
        ]
        for task in dict.fromkeys(task for tasks in self.harness.values() for task in tasks):
            found = {model: tasks.get(task, {}).items() for model, tasks in self.harness.items()}
            models = {model: {name: Measured(values=(value,)) for name, value in measures} for model, measures in found.items()}
            tables.append(_table(f"lm-evaluation-harness: {task}", models))
        return tables


def _table(title: str, models: Mapping[str, Mapping[str, Measured]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(escape(model), justify="right", overflow="fold")
    for measure in dict.fromkeys(measure for measures in models.values() for measure in measures):
        table.add_row(measure, *(str(measures.get(measure, "")) for measures in models.values()))
    return table
