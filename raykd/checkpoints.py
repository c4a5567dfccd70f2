"""What a run keeps: checkpoints to resume from, and the best weights of a stage.

checkpoints/step-000400    learner (every rank's weights and optimiser), replay.pkl, driver.json (position, prompt streams)
checkpoints/best-000350    weights that a stage hands on, where they are not its last
"""

import json
import math
import pickle
import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raykd.experiment import HIGHER_IS_BETTER, Stage
from raykd.phases import Position
from raykd.prompts import Data
from raykd.workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where it lies, and what the driver keeps there."""

    folder: Path
    position: Position
    data: dict[str, Any]
    """Where prompts and text stood."""

    @property
    def run(self) -> Path:
        return self.folder.parents[1]


def save_checkpoint(
    workers: Workers, data: Data, run: Path, at: Position, *, kept: int | None, prompts: dict[str, Any] | None = None
) -> None:
    """Everything a resumed run needs, complete or absent: written beside, then renamed. Older ones go, so that ``kept`` are left.
    ``prompts`` is where the stream stood before the responses that nobody has learned from yet: they are written again."""
    final = run / "checkpoints" / f"step-{at.total:06d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    workers.save(partial / "learner")
    (partial / "replay.pkl").write_bytes(pickle.dumps(workers.call_replay("state")))
    streams = data.state() | ({"prompts": prompts} if prompts else {})
    (partial / "driver.json").write_text(json.dumps({"position": asdict(at), "streams": streams}), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    forget_checkpoints(run, kept)
    forget_bests(run, at)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete one of a run, if there is one."""
    if not (folders := _checkpoints(run)):
        return None
    state = json.loads((folders[-1] / "driver.json").read_text(encoding="utf-8"))
    return Checkpoint(folder=folders[-1], position=Position(**state["position"]), data=state["streams"])


def what_is_left(run: Path) -> str:
    """Of a run that stopped before its end, for its user."""
    if not (folders := _checkpoints(run)):
        return f"stopped before the first checkpoint of {run}"
    return f"stopped; --resume {run} goes on after step {_step(folders[-1])}"


def restore_workers(workers: Workers, checkpoint: Checkpoint) -> Position:
    """Learner and replay buffer go on where a checkpoint left them; returns the run's position there."""
    workers.restore(checkpoint.folder / "learner", checkpoint.position.total)
    workers.call_replay("restore", pickle.loads((checkpoint.folder / "replay.pkl").read_bytes()))
    return deepcopy(checkpoint.position)  # it moves on


def forget_checkpoints(run: Path, kept: int | None) -> None:
    """Remove all but the newest ``kept``, None removes none; and what a crash left unfinished."""
    for folder in [*_checkpoints(run)[: -kept if kept else 0], *(run / "checkpoints").glob("step-*.partial")]:
        shutil.rmtree(folder)


def _checkpoints(run: Path) -> list[Path]:
    """The complete ones, the newest last."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial"]
    return sorted(folders, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def keep_best(stage: Stage, measured: dict[str, float], workers: Workers, run: Path, at: Position) -> None:
    """Save the weights where they are the best of the stage so far, by the number that it keeps."""
    if stage.keep == "last":
        return
    sign = -1 if stage.keep in HIGHER_IS_BETTER else 1
    value = measured[stage.keep]
    if math.isfinite(value) and (not at.best or sign * value < sign * at.best[stage.keep]):
        at.best = measured | {"step": at.total}
        workers.save(_best(run, at))


def restore_best(stage: Stage, measured: dict[str, float], workers: Workers, run: Path, at: Position) -> dict[str, float]:
    """Go on with the best weights of a stage that keeps them; returns the held-out numbers of those that go on."""
    if not at.best:
        if stage.keep != "last":
            raise ValueError(f"no held-out {stage.keep} of the stage was finite: no weights are worth keeping; see metrics.jsonl")
        return measured
    best = {name: value for name, value in at.best.items() if name != "step"}
    if at.best["step"] != at.total:
        workers.restore(_best(run, at), at.total)
        at.held_out += [best["loss"]] if "loss" in best else []
    return best


def forget_bests(run: Path, at: Position) -> None:
    """Remove best weights that the newest checkpoint does not name."""
    for folder in (run / "checkpoints").glob("best-*"):
        if not at.best or folder != _best(run, at):
            shutil.rmtree(folder)


def _best(run: Path, at: Position) -> Path:
    return run / "checkpoints" / f"best-{int(at.best['step']):06d}"
