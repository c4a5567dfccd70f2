"""Numbers of a run: ``metrics.jsonl`` always, Weights & Biases beside it, a progress bar on a terminal."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN = ("loss", "reverse_kl", "divergence", "response_length")
"""Metrics shown beside the progress bar."""


class Tracker:
    """Writes one line of numbers per optimiser step or evaluation; ``with Tracker(...) as tracker: tracker.log(...)``."""

    def __init__(self, run: Path, experiment: Mapping[str, Any], *, name: str, wandb: bool, project: str, console: Console) -> None:
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._started = time.monotonic()
        self._wandb = _start_wandb(run, experiment, name, project) if wandb else None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.console = console
        self._task = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def begin(self, description: str, total: int, done: int = 0) -> None:
        """Start the progress bar of a stage."""
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=done, numbers="")
        self.console.log(f"{description}: {total} steps", highlight=False)

    def log(self, step: int, metrics: Mapping[str, float | str], *, advance: bool = True) -> None:
        """Record the numbers of a step; ``step`` counts optimiser steps over all stages."""
        seconds = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps({"step": step, "seconds": seconds, **metrics}) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        if self._task is not None and advance:
            numbers = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if isinstance(metrics.get(name), float))
            self._progress.update(self._task, advance=1, numbers=numbers)


def _start_wandb(run: Path, experiment: Mapping[str, Any], name: str, project: str) -> Any:
    import wandb  # imported where it is used: runs without it need not have it

    online = bool(os.environ.get("WANDB_API_KEY"))
    settings = wandb.Settings(silent=True, console="off")
    mode = "online" if online else "offline"
    return wandb.init(project=project, name=name, dir=run, config=dict(experiment), mode=mode, settings=settings)
