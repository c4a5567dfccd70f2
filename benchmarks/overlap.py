"""Optimiser steps per hour with phases written ahead, and with replay: the real loop, Phases and replay buffer, with workers that
only take time.

    python benchmarks/overlap.py

Every verb sleeps for a stage time drawn once per call (mean given below, +-20 %), so that what is measured is the loop's own
overlap and not the machine's cores. The bound is the slowest lane's busy time: nothing is faster than the work of one lane.
With replay a step that finds a batch of old responses may write none (DistiLLM's schedule on the student's text alone): work is
saved instead of hidden, and the bound is that of the work which is left.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from folders import temporary
from rich.console import Console
from rich.table import Table
from stamp import stamp

from raykd.algorithms import GKD, AdaptiveSchedule, DistiLLM, MiniLLM
from raykd.algorithms.base import Algorithm, Needs
from raykd.experiment import EvaluationConfig, Experiment, Model, Stage
from raykd.phases import Position
from raykd.prompts import Data, PromptStream
from raykd.records import Prompt, Rollout, Row, Source
from raykd.replay import ReplayBuffer
from raykd.sources import Pairs
from raykd.tracking import Tracker
from raykd.train import train
from raykd.usage import Usage
from raykd.workers import Workers, unscored

BATCH = 32
PROFILES = {
    "generation-bound": {"generate": 0.20, "score": 0.04, "learn": 0.08},
    "balanced": {"generate": 0.10, "score": 0.10, "learn": 0.10},
    "learner-bound": {"generate": 0.08, "score": 0.04, "learn": 0.20},
}
"""Seconds for the rows of one optimiser step."""
METHODS: dict[str, tuple[Algorithm, int]] = {
    "GKD": (GKD(), 60),
    "replay": (DistiLLM(schedule=AdaptiveSchedule(start=1.0, step=0.0)), 60),
    "MiniLLM, 4 epochs": (MiniLLM(rollouts=4 * BATCH, epochs=4, text_coefficient=0), 192),
}
"""Each with its optimiser steps."""
RESULTS = Path(__file__).parent / "results" / "overlap.json"


class Sleepers:
    """The verbs that the loop calls, each taking its stage time; busy seconds by lane."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._random, self._replay = seconds, random.Random(0), ReplayBuffer(seed=0)
        self.busy = dict.fromkeys(seconds, 0.0)
        self.version, self.teachers, self.in_flight = 0, None, False
        self.usage = Usage(())

    def _work(self, verb: str, rows: int) -> None:
        seconds = self._seconds[verb] * rows / BATCH * self._random.uniform(0.8, 1.2)
        self.busy[verb] += seconds
        time.sleep(seconds)

    def generate(self, prompts: Sequence[Prompt], update: int, *, samples: int, teacher_share: float, **_: Any) -> list[Rollout]:
        """Responses of one token by the version that ``update`` is."""
        self._work("generate", len(prompts) * samples)
        source = Source.TEACHER if teacher_share == 1 else Source.STUDENT
        common = {"tokens": (1,), "student_logprobs": (-1.0,), "source": source, "version": update}
        return [
            Rollout(prompt_id=p.id, sample=sample, prompt_tokens=p.tokens, **common) for p in prompts for sample in range(samples)
        ]

    def sleep(self) -> None:
        """No GPU memory to give back."""

    def score(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None) -> list[Row]:
        """Rows without scores."""
        self._work("score", len(rollouts))
        return unscored(rollouts)

    def step(self, terms: Sequence[Any], learning_rate: float) -> dict[str, float]:
        """A step on the rows of the first term."""
        self._work("learn", len(terms[0].rows))
        self.version += 1
        return {"loss": 0.0}

    def publish(self) -> int:
        """The version itself stands for its weights."""
        return self.version

    def call_replay(self, method: str, *arguments: Any) -> Any:
        """A verb of the real buffer."""
        return getattr(self._replay, method)(*arguments)

    def begin(self, optimiser: object) -> None:
        """Nothing to begin."""

    def save(self, folder: Path) -> None:
        """Nothing to save."""


def measure(algorithm: Algorithm, steps: int, seconds: dict[str, float], max_staleness: int) -> dict[str, float]:
    """Steps per hour of a run, the bound of its slowest lane, and how old the rows were."""
    stage = Stage.model_validate(
        {"algorithm": algorithm.model_dump(), "steps": steps, "batch_size": BATCH, "max_staleness": max_staleness}
    )
    experiment = Experiment(
        name="overlap",
        student=Model(path="none"),
        teacher=Model(path="none"),
        data=Pairs(path="none"),
        stages=(stage,),
        evaluation=EvaluationConfig(prompts=0),
    )
    prompts = [Prompt(id=str(index), tokens=(1,)) for index in range(1024)]
    data = Data(prompts=PromptStream(prompts, seed=0), held_out=[], decode=str, text=None, vocab_size=2)
    workers, folder = Sleepers(seconds), temporary("overlap")
    with Tracker(folder, {}, name="overlap", wandb=False, project="", console=Console(quiet=True)) as tracker:
        started = time.perf_counter()
        train(experiment, cast(Workers, workers), data, tracker, folder, Position())
        elapsed = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps_per_hour": steps / elapsed * 3600,
        "of_bound": max(workers.busy.values()) / elapsed,
        "staleness": sum(line["staleness"] for line in lines if "loss" in line) / steps,
    }


def main() -> None:
    """Measure every profile and method, print the table, write it as JSON."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table("method", "stage times", "S", "steps/hour", "of bound", "age, steps", caption="S: max_staleness")
    results = []
    for method, (algorithm, steps) in METHODS.items():
        for profile, seconds in PROFILES.items():
            for max_staleness in (0, 1, 2):
                numbers = measure(algorithm, steps, seconds, max_staleness)
                results.append({"method": method, "profile": profile, "max_staleness": max_staleness, "steps": steps, **numbers})
                shown = f"{numbers['steps_per_hour']:,.0f}", f"{numbers['of_bound']:.0%}", f"{numbers['staleness']:.1f}"
                table.add_row(method, profile, str(max_staleness), *shown)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"measured": stamp(), "seconds": PROFILES, "results": results}, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
