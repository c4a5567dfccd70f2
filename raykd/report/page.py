"""Runs and evaluations -> page.html, filled in."""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from raykd import __version__
from raykd.report import figures, tables
from raykd.report.folders import EvaluationLog, RunLog, read
from raykd.report.meanings import HELD_OUT

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """One page about run directories and results of ``raykd evaluate``, side by side.

    Goes to ``output``, by default to report.html in the run directory, or in the folder that several of them share.
    Raises ValueError for a path that is neither.
    """
    found = {path.resolve(): read(path) for path in paths}
    if not found:
        raise ValueError("nothing to report on; name at least one run directory")
    runs = _tell_apart({path: run for path, (run, _) in found.items() if run})
    evaluations = [evaluation for _, of_path in found.values() for evaluation in of_path]
    folders = [path if path.is_dir() else path.parent for path in found]
    output = output or Path(os.path.commonpath(folders)) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs, evaluations), encoding="utf-8")
    return output


def render(runs: Sequence[RunLog], evaluations: Sequence[EvaluationLog]) -> str:
    """The page; a section without content is left out."""
    looks = figures.looks_of([run.name for run in runs])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        version=__version__,
        now=datetime.now(UTC),
        runs=runs,
        looks=looks,
        evaluations=evaluations,
        held_out=HELD_OUT,
        held_out_figures=figures.held_out_figures(runs, looks) + (figures.kl_against_time(runs, looks) if len(runs) > 1 else []),
        step_figures=figures.step_figures(runs, looks),
        constants=figures.constants(runs),
        time_figures=figures.time_figures,
        tables=tables,
    )


def _tell_apart(runs: dict[Path, RunLog]) -> list[RunLog]:
    """Runs of the same name are called by as many of the folders above them as it takes."""
    return [replace(run, name=_own_end(path, runs)) for path, run in runs.items()]


def _own_end(path: Path, paths: Collection[Path]) -> str:
    """The shortest end of a path that no other has."""
    ends = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
    return next(str(Path(*end)) for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1)
