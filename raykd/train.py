"""THE LOOP.

    prompts -> rollout fleet -> teacher fleet -> replay buffer -> learner ranks
                   ^                                                  |
                   +---------------- weights (a version) -------------+

A phase: responses are written (by the data set, the student, the teacher, or both mixed), scored, put into the replay buffer, and
learned from in mini-batches, for as many epochs as the algorithm asks. Phases may be written ahead (phases.py).
Everything below holds references and numbers; tensors go from worker to worker.
"""

import json
import math
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raykd.algorithms.base import Algorithm
from raykd.experiment import Experiment, Optimiser, Stage
from raykd.phases import Phase, Phases, Position, assess
from raykd.prompts import Data
from raykd.records import Rollout
from raykd.tracking import Tracker
from raykd.usage import shares
from raykd.validation import forget_bests, keep_best, measure, restore_best, summary
from raykd.workers import Term, Workers


def train(experiment: Experiment, workers: Workers, data: Data, tracker: Tracker, run: Path, at: Position) -> dict[str, float]:
    """Run the stages from ``at`` to their end, with a checkpoint after each; returns the last held-out numbers."""
    held_out: dict[str, float] = {}
    while at.stage < len(experiment.stages):
        stage = experiment.stages[at.stage]
        if at.step == 0:
            workers.begin(stage.optimiser)
            workers.call_replay("begin", stage.bounds)
            del at.held_out[:-1]  # the last one was measured before this stage
            at.best = {}
        else:  # resumed, perhaps with other settings
            workers.tune(stage.optimiser)
            workers.call_replay("bound", stage.bounds)
            rescore(workers, stage.algorithm)
        tracker.begin(f"stage {at.stage}: {type(stage.algorithm).__name__}", stage.steps, at.step)
        with Phases(experiment, stage, workers, data.prompts, at) as phases:
            while at.step < stage.steps:
                phase = phases.next()
                if phase.rows and phase.mixture.keep:
                    workers.call_replay("add", phase.rows)
                for _ in range(min(stage.steps_per_phase, stage.steps - at.step)):
                    learn(phase, stage, workers, data, tracker, at)
                if _due(experiment.evaluation.every, at, stage):
                    phases.settle()
                    keep_best(stage, measure(experiment, workers, data, tracker, at), workers, run, at)
                if _due(experiment.checkpoint_every, at, stage):
                    save_checkpoint(workers, data, run, at, phases.unlearned)
        held_out = measure(experiment, workers, data, tracker, at)
        keep_best(stage, held_out, workers, run, at)
        held_out = restore_best(stage, held_out, workers, run, at)
        at.stage, at.step = at.stage + 1, 0
        save_checkpoint(workers, data, run, at)
    return held_out


def learn(phase: Phase, stage: Stage, workers: Workers, data: Data, tracker: Tracker, at: Position) -> None:
    """One optimiser step, on a draw of the replay buffer or on the phase's responses themselves."""
    rows = workers.call_replay("sample", stage.batch_size, workers.version) if phase.mixture.replay else phase.rows
    numbers = stage.algorithm.per_step(replace(phase.progress, step=at.step), rows)
    terms = [Term(algorithm=stage.algorithm, rows=rows, numbers=numbers), *text_terms(stage, workers, data)]
    metrics = workers.step(terms, learning_rate(stage.optimiser, at.step, stage.steps))
    at.step, at.total = at.step + 1, at.total + 1
    written = summary([row.rollout for row in rows], at.total)
    usage = workers.usage.take()
    tracker.log(at.total, metrics | numbers | written | usage, shares(usage))


def rescore(workers: Workers, algorithm: Algorithm) -> None:
    """Restored rows have no scores: the teacher is frozen, so they are computed again."""
    rows = workers.call_replay("rows")
    if rows:
        workers.call_replay("rescore", assess(workers, [row.rollout for row in rows], algorithm))


def text_terms(stage: Stage, workers: Workers, data: Data) -> list[Term]:
    """The loss on plain text, where the algorithm has one: as many chunks as responses."""
    text = stage.algorithm.text
    if text is None or data.text is None:
        return []
    chunks = [Rollout.reference(chunk) for chunk in data.text.take(stage.batch_size)]
    return [Term(algorithm=text.algorithm, rows=workers.score(chunks, text.algorithm.needs), weight=text.weight)]


def learning_rate(optimiser: Optimiser, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then constant, linear or half-cosine to ``learning_rate_min`` at ``steps``."""
    if step < optimiser.warmup_steps:
        return optimiser.learning_rate * (step + 1) / optimiser.warmup_steps
    done = (step - optimiser.warmup_steps) / max(1, steps - optimiser.warmup_steps)
    share = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optimiser.schedule]
    return optimiser.learning_rate_min + (optimiser.learning_rate - optimiser.learning_rate_min) * share


def save_checkpoint(workers: Workers, data: Data, run: Path, at: Position, prompts: dict[str, Any] | None = None) -> None:
    """Everything a resumed run needs, complete or absent: written beside, then renamed. ``prompts`` is where the stream stood
    before the responses that nobody has learned from yet: they are written again."""
    final = run / "checkpoints" / f"step-{at.total:06d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    workers.save(partial / "learner")
    (partial / "replay.pkl").write_bytes(pickle.dumps(workers.call_replay("state")))
    streams = {"prompts": prompts or data.prompts.state(), "text": data.text.state() if data.text else None}
    (partial / "driver.json").write_text(json.dumps({"position": asdict(at), "streams": streams}), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    forget_bests(run, at)


def restore_data(data: Data, run: Path) -> None:
    """Prompts and text go on where the newest checkpoint of a run left them; ValueError where they are not the same."""
    _, state = newest_checkpoint(run)
    data.prompts.restore(state["streams"]["prompts"])
    if data.text is not None:
        data.text.restore(state["streams"]["text"])


def restore_checkpoint(workers: Workers, run: Path) -> Position:
    """Learner and replay buffer go on from the newest complete checkpoint of a run; ValueError where there is none."""
    folder, state = newest_checkpoint(run)
    position = Position(**state["position"])
    workers.restore(folder / "learner", position.total)
    workers.call_replay("restore", pickle.loads((folder / "replay.pkl").read_bytes()))
    return position


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """Its folder and what the driver keeps there; ValueError where a run has none."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial"]
    if not folders:
        raise ValueError(f"run {run} has no complete checkpoint; start it afresh without --resume")
    newest = max(folders, key=lambda path: int(path.name.removeprefix("step-")))
    return newest, json.loads((newest / "driver.json").read_text(encoding="utf-8"))


def _due(every: int, at: Position, stage: Stage) -> bool:
    """Whether a multiple of ``every`` was passed in the phase just done, and the stage goes on."""
    return every > 0 and at.step < stage.steps and at.step // every > (at.step - stage.steps_per_phase) // every
