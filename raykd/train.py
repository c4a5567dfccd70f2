"""THE LOOP.

    prompts -> rollout fleet -> teacher fleet -> replay buffer -> learner ranks
                   ^                                                  |
                   +---------------- weights (a version) -------------+

A phase: responses are written (by the data set, the student, the teacher, or both mixed), scored, put into the replay buffer, and
learned from in mini-batches, for as many epochs as the algorithm asks. Phases may be written ahead (phases.py).
Everything below holds references and numbers; tensors go from worker to worker.
"""

import math
from dataclasses import replace
from pathlib import Path

from raykd.algorithms.base import Algorithm
from raykd.checkpoints import keep_best, restore_best, save_checkpoint
from raykd.experiment import Experiment, Optimiser, Stage
from raykd.mismatch import disagreement
from raykd.phases import Phase, Phases, Position, assess
from raykd.prompts import Data
from raykd.records import Rollout
from raykd.tracking import Tracker, say
from raykd.usage import shares
from raykd.validation import measure, summary
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
        workers.usage.take()  # what came before is part of no step
        tracker.begin(f"stage {at.stage}: {type(stage.algorithm).__name__}", stage.steps, at.step)
        with Phases(experiment, stage, workers, data.prompts, at) as phases:
            while at.step < stage.steps:
                phase = phases.next()
                if phase.rows and phase.mixture.into_replay:
                    workers.call_replay("add", phase.rows)
                for _ in range(min(stage.steps_per_phase, stage.steps - at.step)):
                    learn(phase, stage, workers, data, tracker, at)
                if _due(experiment.evaluation.every, at, stage):
                    phases.settle()
                    keep_best(stage, measure(experiment, workers, data, tracker, at), workers, run, at)
                if _due(experiment.checkpoint_every, at, stage):
                    save_checkpoint(workers, data, run, at, kept=experiment.checkpoints_kept, prompts=phases.unlearned)
        held_out = measure(experiment, workers, data, tracker, at)
        keep_best(stage, held_out, workers, run, at)
        held_out = restore_best(stage, held_out, workers, run, at)
        at.stage, at.step = at.stage + 1, 0
        save_checkpoint(workers, data, run, at, kept=experiment.checkpoints_kept)
    return held_out


def learn(phase: Phase, stage: Stage, workers: Workers, data: Data, tracker: Tracker, at: Position) -> None:
    """One optimiser step, on a draw of the replay buffer or on the phase's responses themselves."""
    rows = workers.call_replay("sample", stage.batch_size, workers.version) if phase.mixture.from_replay else phase.rows
    numbers = stage.algorithm.per_step(replace(phase.progress, step=at.step), rows)
    terms = [Term(algorithm=stage.algorithm, rows=rows, numbers=numbers), *text_terms(stage, workers, data)]
    metrics = workers.step(terms, learning_rate(stage.optimiser, at.step, stage.steps))
    if at.step == 0 and (said := disagreement(metrics)):  # before anything was learned
        say(tracker.console, said)
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


def _due(every: int, at: Position, stage: Stage) -> bool:
    """Whether a multiple of ``every`` was passed in the phase just done, and the stage goes on."""
    return every > 0 and at.step < stage.steps and at.step // every > (at.step - stage.steps_per_phase) // every
