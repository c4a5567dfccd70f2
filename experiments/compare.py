"""Every method on the stories pair, side by side, with the ablations behind the papers' findings: docs/comparison.md.

    fine-tuning -> student -> every method from that student -> measures of what it became -> tables, figures, findings

    python experiments/compare.py                # what is missing; a finished run is never repeated
    python experiments/compare.py --minutes 4    # of that, what will be done in so many minutes
    python experiments/compare.py --only report  # reads what is there

One fine-tuning for each size and seed; everything else of that size and seed goes on from its student, with the same prompts,
rate, batch and steps. The rate is constant after its warm-up, so no step knows how many will follow (but for the schedules of
DistiLLM and DistiLLM-2, which are parts of a whole): a curve cut anywhere is the shorter run, and shows the student after equal
time as well. Two lanes, each with all its processes on one core; the workers start once for all methods of a size and seed.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Literal

import tyro
from compare_gaps import GAPS, watch_gaps
from compare_measures import measure_student
from compare_report import write
from rich.console import Console
from stories import STEPS, stories

from raykd.algorithms import GKD, SFT, AdaptiveSchedule, AnyAlgorithm, DistiLLM
from raykd.algorithms.gkd import ForwardKL, Jeffreys, ReverseKL, SkewForwardKL, SkewReverseKL
from raykd.experiment import EvaluationConfig, Experiment, Model, Optimiser, Stage, TrackingConfig
from raykd.report.folders import EVALUATION

START, HEADS = "start", "head_and_tail"
SEEDS = (0, 1, 2)
LANES = 2
SESSION_S, GUESS_S = 60.0, 60.0
"""Expected seconds until the workers of a session run, and of a run of which nothing is known yet."""
LAST_WRITTEN = Path("student", "tokenizer_config.json")
MEASURE_EVERY = 16
LONG = 240
"""Steps of the methods without generation where they get as much time as those with it."""

METHODS: dict[str, AnyAlgorithm] = {
    path.stem.removeprefix("stories_"): import_module(path.stem).EXPERIMENT.stages[-1].algorithm
    for path in sorted(Path(__file__).parent.glob("stories_*.py"))
}
"""With the settings of their files."""

MINILLM = METHODS["minillm"]
ABLATIONS: dict[str, AnyAlgorithm] = {
    "minillm_no_length_norm": MINILLM.model_copy(update={"length_normalise": False}),
    "minillm_no_mixing": MINILLM.model_copy(update={"teacher_share": 0.0}),
    "minillm_no_single_step": MINILLM.model_copy(update={"single_step": False, "include_current_reward": True}),
    "gkd_half": GKD(student_share=0.5),
    "gkd_data": GKD(student_share=0.0),
    "forward_kl_student": GKD(divergence=ForwardKL()),
    "reverse_kl_data": GKD(divergence=ReverseKL(), student_share=0.0),
    "jeffreys_data": GKD(divergence=Jeffreys(), student_share=0.0),
    "skew_forward_data": GKD(divergence=SkewForwardKL(), student_share=0.0),
    "skew_reverse_data": GKD(divergence=SkewReverseKL(), student_share=0.0),
    "skew_reverse_student": GKD(divergence=SkewReverseKL()),
    "skew_reverse_replay": DistiLLM(schedule=AdaptiveSchedule(start=1.0, step=0.0)),
}
"""What docs/comparison.md sets beside the methods, one field apart from one of them."""

LONG_RUNS = {f"{name}_long": METHODS[name] for name in ("sft", "kd", "akl", "distillm")}
VARIANTS: dict[str, AnyAlgorithm] = {START: SFT(), **METHODS, **ABLATIONS, **LONG_RUNS}


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the comparison."""

    size: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.size}-{self.seed}"

    @property
    def start(self) -> "Entry":
        """The fine-tuning whose student this run begins with."""
        return Entry(self.size, START, self.seed)

    @property
    def folder(self) -> Path:
        return stories(SFT()).runs / "compare" / self.name

    @property
    def checkpoint(self) -> Path:
        """Of the learner at its end."""
        return max(self.folder.glob("checkpoints/step-*")) / "learner"

    @property
    def trained(self) -> bool:
        return self.variant == HEADS or (self.folder / LAST_WRITTEN).is_file()  # which has nothing to train

    @property
    def finished(self) -> bool:
        return (self.folder / (GAPS if self.variant == HEADS else EVALUATION)).is_file()


def plan() -> list[list[Entry]]:
    """Every run. The entries of a group share a student to begin with; what is worth most comes first, the small student with all
    its ablations before the larger one."""

    def group(size: str, seed: int, *variants: str) -> list[Entry]:
        return [Entry(size, variant, seed) for variant in variants]

    small = [group("fifth", seed, *METHODS) for seed in SEEDS]
    large = [group("half", seed, *METHODS) for seed in SEEDS]
    others = [group("fifth", seed, *ABLATIONS, *LONG_RUNS, HEADS) for seed in SEEDS]
    starts = {size: [group(size, seed, START) for seed in SEEDS] for size in ("fifth", "half")}
    return [*starts["fifth"], *small[:2], others[0], small[2], *starts["half"], large[0], others[1], *large[1:], others[2]]


def experiment(entry: Entry) -> Experiment:
    """The run of an entry."""
    base = stories(VARIANTS[entry.variant], MEASURE_EVERY, entry.size)
    fine_tuning, method = base.stages
    changes = {"name": entry.name, "seed": entry.seed, "runs": entry.folder.parent, "tracking": TrackingConfig(wandb=False)}
    if entry.variant == START:
        return base.model_copy(update=changes | {"stages": (fine_tuning,), "evaluation": EvaluationConfig(prompts=128)})
    stage = Stage(
        algorithm=method.algorithm,
        steps=LONG if entry.variant in LONG_RUNS else STEPS,
        batch_size=method.batch_size,
        optimiser=Optimiser(learning_rate=1e-3, warmup_steps=8),
    )
    return base.model_copy(update=changes | {"stages": (stage,), "student": Model(path=str(entry.start.folder / "student"))})


def train_group(group: Sequence[Entry], deadline: float) -> list[Entry]:
    """Train of a group what is missing and will be done by ``deadline``, in seconds of the epoch; returns what was trained."""
    from compare_session import Session

    from raykd.run import run

    trained: list[Entry] = []
    with ExitStack() as sessions:
        session: Session | None = None
        for entry in group:
            starting = 0.0 if session else SESSION_S
            if entry.trained or time.time() + starting + expected_seconds(entry) > deadline:
                continue
            shutil.rmtree(entry.folder, ignore_errors=True)  # a run that was interrupted begins anew
            entry.folder.parent.mkdir(parents=True, exist_ok=True)
            with entry.folder.with_suffix(".log").open("w", encoding="utf-8") as log:
                if entry.variant == START:
                    run(experiment(entry), console=Console(file=log))
                else:
                    every = [experiment(other) for other in group if other.variant in VARIANTS]
                    session = session or sessions.enter_context(Session(every, entry.start.checkpoint))
                    session.run(experiment(entry), Console(file=log))
            trained.append(entry)
    return trained


def expected_seconds(entry: Entry) -> float:
    """As long as a finished run of the same variant took; else a guess."""
    logs = entry.folder.parent.glob(f"{entry.variant}-*-*/metrics.jsonl")
    finished = [log.read_text(encoding="utf-8").splitlines() for log in logs if (log.parent / LAST_WRITTEN).is_file()]
    return max((json.loads(lines[-1])["seconds"] for lines in finished), default=GUESS_S)


def measure_entry(entry: Entry) -> Entry:
    """Measure a trained student."""
    if entry.variant == HEADS:
        watch_gaps(entry.start.folder / "student_init", entry.start.folder / "student", entry.folder, entry.seed)
    else:
        measure_student(entry.folder)
    return entry


def train_missing(minutes: float, console: Console) -> None:
    """Train group after group in their order, one in each lane, as soon as the student that they begin with is there."""
    deadline = time.time() + 60 * minutes
    waiting = [group for group in plan() if not all(entry.trained for entry in group)]
    with lanes() as (pool, num_lanes):
        running: set[Future[list[Entry]]] = set()
        while waiting or running:
            while len(running) < num_lanes and (group := next(filter(ready, waiting), None)):
                waiting.remove(group)
                running.add(pool.submit(train_group, group, deadline))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for entry in (entry for future in done for entry in future.result()):
                console.print(f"trained {entry.name}", highlight=False)
            if not running and not any(map(ready, waiting)):
                break


def ready(group: Sequence[Entry]) -> bool:
    """Whether there is a student to begin with."""
    return group[0].variant == START or group[0].start.trained


def measure_missing(console: Console) -> None:
    """Measure whatever is trained."""
    entries = [entry for group in plan() if ready(group) for entry in group if entry.trained and not entry.finished]
    with lanes() as (pool, _):
        for entry in pool.map(measure_entry, entries):
            console.print(f"measured {entry.name}", highlight=False)


@contextmanager
def lanes() -> Iterator[tuple[ProcessPoolExecutor, int]]:
    """A process for each lane, and all that it starts stays on its core: Ray, engines and learner of a run."""
    context = get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))[:LANES]
    free: Queue[int] = context.Queue()
    for core in cores:
        free.put(core)
    os.environ["OMP_NUM_THREADS"] = "1"  # more than one thread on one core wait for each other
    with ProcessPoolExecutor(len(cores), mp_context=context, initializer=_keep_to_one, initargs=(free,)) as pool:
        yield pool, len(cores)


def _keep_to_one(free: "Queue[int]") -> None:
    os.sched_setaffinity(0, {free.get()})


def main(only: Literal["all", "train", "measure", "report"] = "all", minutes: float = math.inf) -> None:
    """Train and measure what is missing, then write docs/comparison.md.

    Args:
        only: One part of it.
        minutes: Train only what will be done in so many minutes.
    """
    console = Console()
    if only in ("all", "train"):
        train_missing(minutes, console)
    if only in ("all", "measure"):
        measure_missing(console)
    if only in ("all", "report"):
        write([entry for group in plan() for entry in group if entry.finished])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
