"""Numbers of a run: ``metrics.jsonl`` always, Weights & Biases beside it, a progress bar on a terminal."""

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from uuid import uuid4

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = ("loss", "reverse_kl", "response_length")
"""Metrics shown beside the progress bar."""
LINE_EVERY_S = 60.0
"""In the log of a job, where there is no bar: a line for every tenth of a stage, and for a step after so much silence."""
SPEED_OVER_S = 3600.0
"""What is left is told from the speed of the last hour: steps come in bursts, and some take minutes."""


class Tracker:
    """Writes one line of numbers per optimiser step or evaluation; ``with Tracker(...) as tracker: tracker.log(...)``.
    Their clock starts with the ``with``."""

    def __init__(
        self, run: Path, experiment: Mapping[str, Any], *, name: str, wandb: bool, project: str, console: Console
    ) -> None:
        self._run = run
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        _claim(self._file, run)
        if self._file.tell() and not (run / "metrics.jsonl").read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the line in which the run died stays its own
        self._wandb: Any = None
        try:
            self._wandb = _start_wandb(run, experiment, name, project) if wandb else None
        except ValueError:
            self.close()
            raise
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            speed_estimate_period=SPEED_OVER_S,
            console=console,
            disable=not console.is_terminal,
        )
        self.console = console
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self.close(exit_code=0 if error is None else 1)

    def close(self, exit_code: int = 1) -> None:
        """Another process may write the run from now on."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
            self._wandb = None

    def begin(self, description: str, total: int, done: int = 0) -> None:
        """Start the progress bar of a stage."""
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=done, numbers="")
        self._said = -math.inf  # when a step was last told of in a line

    def log(self, step: int, metrics: Mapping[str, float], busy: Mapping[str, float] | None = None) -> None:
        """Record an optimiser step; ``step`` counts over all stages, ``busy`` is the share of the time that each lane worked."""
        self._write(step, metrics)
        if self._task is None:
            return
        shown = [f"{name} {metrics[name]:z.3f}" for name in SHOWN if name in metrics]
        shown += [f"{lane} {share:.0%} busy" for lane, share in (busy or {}).items()]
        numbers = "  ".join(shown)
        self._progress.update(self._task, advance=1, numbers=numbers)
        if not self.console.is_terminal:
            self._say_step(self._progress.tasks[-1], numbers)

    def log_held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record held-out numbers under ``heldout/``."""
        self._write(step, {f"heldout/{name}": value for name, value in metrics.items()})
        say(self.console, f"held out after step {step}:  " + "  ".join(f"{name} {value:z.3f}" for name, value in metrics.items()))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Keep answers as text: one line each in ``samples.jsonl``."""
        with (self._run / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)

    def _say_step(self, stage: Task, numbers: str) -> None:
        done, total, now = int(stage.completed), int(stage.total or 0), time.monotonic()
        if done % max(1, total // 10) == 0 or now - self._said >= LINE_EVERY_S:
            left = "" if not stage.time_remaining else f"  {timedelta(seconds=stage.time_remaining)} left"
            say(self.console, f"{stage.description}  {done}/{total}{left}  {numbers}")
            self._said = now

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps({"step": step, "seconds": seconds, **metrics}) + "\n")
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})


def _claim(file: TextIO, run: Path) -> None:
    """No other process writes this run while this one lives. Raises ValueError where one does: a job may outlive its terminal."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{run} is being written by a run that is still going on; end that one first") from None
    except OSError:  # a file system without locks
        pass


def say(console: Console, text: str) -> None:
    """Print it as it is: a name in brackets is no markup, and a long path stays in one piece."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The readable lines, and how many are not: a run that is going on may be in the middle of its last one."""
    if not path.is_file():
        return [], 0
    found, unread = [], 0
    # not splitlines: U+2028 and its like, which JSON may hold as they are, end no line
    for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            unread += 1
    return found, unread


def _start_wandb(run: Path, experiment: Mapping[str, Any], name: str, project: str) -> Any:
    import wandb  # imported where it is used: runs without it need not have it

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    number = run / "wandb_id"
    if not number.exists():
        number.write_text(uuid4().hex)
    there: dict[str, Any] = {"project": project, "name": name, "dir": run, "config": dict(experiment), "mode": mode}
    try:
        # A resumed run goes on with its own curves, also from before the last step that was logged.
        settings = wandb.Settings(silent=True, console="off")
        started = wandb.init(id=number.read_text(), resume="allow", settings=settings, **there)
    except wandb.Error as error:
        raise ValueError(f"Weights & Biases: {error}; mend WANDB_API_KEY, or unset it to keep the numbers in {run}") from error
    started.define_metric("*", step_metric="step")
    return started
