"""Every method on the stories pair, side by side, with the ablations behind the papers' findings: docs/comparison.md.

    fine-tuning -> student -> every method from that student -> measures of what it became -> tables, figures, findings

    python experiments/compare.py                # what is missing; interrupt it at will, a run goes on from its last checkpoint
    python experiments/compare.py --only report  # reads what is there

One fine-tuning for each size and seed; everything else of that size and seed goes on from its student, with the same prompts,
rate, batch and steps. The rate is constant after its warm-up, so no step knows how many will follow (but for the schedules of
DistiLLM and DistiLLM-2, which are parts of a whole): a curve cut anywhere is the shorter run, and shows the student after equal
time as well. Two lanes, each with all its processes on one core; the workers start once for all methods of a size and seed.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Literal

import tyro
from comparison.gaps import watch_gaps
from comparison.measures import measure_student
from comparison.plan import HEADS, START, Entry, experiment, plan
from comparison.report import write
from rich.console import Console

LANES = 2


def train_group(group: Sequence[Entry]) -> list[Entry]:
    """Train what is missing of a group; returns what was trained."""
    from comparison.session import Session

    from raykd.run import run

    missing = [entry for entry in group if not entry.trained]
    with ExitStack() as stack:
        session: Session | None = None
        for entry in missing:
            entry.folder.parent.mkdir(parents=True, exist_ok=True)
            console = Console(file=stack.enter_context(entry.folder.with_suffix(".log").open("a", encoding="utf-8")))
            if entry.variant == START:
                shutil.rmtree(entry.folder, ignore_errors=True)  # a minute's work, begun anew where it was interrupted
                run(experiment(entry), console=console)
            else:
                every = [experiment(other) for other in missing]
                session = session or stack.enter_context(Session(every, entry.start.checkpoint))
                session.run(experiment(entry), entry.folder, console)
    return missing


def measure_entry(entry: Entry) -> Entry:
    """Measure a trained student."""
    if entry.variant == HEADS:
        watch_gaps(entry.start.folder / "student_init", entry.start.folder / "student", entry.folder, entry.seed)
    else:
        measure_student(entry.folder)
    return entry


def train_missing(console: Console) -> None:
    """Train group after group in their order, one in each lane, as soon as the student that they begin with is there."""
    waiting = [group for group in plan() if not all(entry.trained for entry in group)]
    with lanes() as (pool, num_lanes):
        running: set[Future[list[Entry]]] = set()
        while waiting or running:
            while len(running) < num_lanes and (group := next(filter(ready, waiting), None)):
                waiting.remove(group)
                running.add(pool.submit(train_group, group))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for entry in (entry for future in done for entry in future.result()):
                console.print(f"trained {entry.name}", highlight=False)


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


def main(only: Literal["all", "train", "measure", "report"] = "all") -> None:
    """Train and measure what is missing, then write docs/comparison.md; or only one part of it."""
    console = Console()
    if only in ("all", "train"):
        train_missing(console)
    if only in ("all", "measure"):
        measure_missing(console)
    if only in ("all", "report"):
        write([entry for group in plan() for entry in group if entry.finished])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
