"""Every method on three pairs of teacher and student, with the ablations behind the papers' findings: docs/comparison.md.

    fine-tuning -> student -> every method from that student -> measures of what it became -> tables, figures, findings

    python experiments/compare.py                # what is missing; interrupt it at will, a run goes on from its last checkpoint
    python experiments/compare.py --only report  # reads what is there

One fine-tuning for each pair and seed; everything else of that pair and seed goes on from its student, with the same prompts,
rate, batch and steps. The rate is constant after its warm-up, so no step knows how many will follow (but for the schedules of
DistiLLM and DistiLLM-2, which are parts of a whole): a curve cut anywhere is the shorter run, and shows the student after equal
time as well. Two runs at a time, each in one process and one thread (comparison/in_process.py).
"""

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Literal

import tyro
from comparison.gaps import watch_gaps
from comparison.measures import measure_student
from comparison.pairs import START, TEACHER_TEXT, TEXT
from comparison.plan import HEADS, Entry, experiment, plan
from comparison.report import write
from rich.console import Console

LANES = 2


def train_missing(console: Console) -> None:
    """Train entry after entry in their order, one in each lane, as soon as the student that it begins with is there."""
    waiting = [entry for entry in plan() if not entry.trained]
    with lanes() as (pool, num_lanes):
        running: set[Future[Entry]] = set()
        while waiting or running:
            while len(running) < num_lanes and (entry := next((entry for entry in waiting if entry.ready), None)):
                waiting.remove(entry)
                running.add(pool.submit(train_entry, entry))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                console.print(f"trained {future.result().name}, {len(waiting)} to begin", highlight=False)


def train_entry(entry: Entry) -> Entry:
    """Train it, from its newest checkpoint where it was interrupted."""
    from comparison.in_process import run_in_process

    entry.folder.parent.mkdir(parents=True, exist_ok=True)
    with entry.folder.with_suffix(".log").open("a", encoding="utf-8") as log:
        run_in_process(experiment(entry), Console(file=log), reads=entry.variant in (TEACHER_TEXT, TEXT))
    return entry


def measure_missing(console: Console) -> None:
    """Measure whatever is trained."""
    entries = [entry for entry in plan() if entry.ready and entry.trained and not entry.finished]
    with lanes() as (pool, _):
        for entry in pool.map(measure_entry, entries):
            console.print(f"measured {entry.name}", highlight=False)


def measure_entry(entry: Entry) -> Entry:
    """What it became."""
    if entry.variant == HEADS:
        start = Entry(entry.pair, START, entry.seed)
        watch_gaps(start.folder / "student_init", start.student, entry.folder, entry.seed)
    else:
        measure_student(entry.pair, str(entry.student), entry.teacher, entry.folder)
    return entry


@contextmanager
def lanes() -> Iterator[tuple[ProcessPoolExecutor, int]]:
    """A process of one thread for each lane, on whatever core is free."""
    count = min(LANES, len(os.sched_getaffinity(0)))
    os.environ["OMP_NUM_THREADS"] = "1"  # two lanes of two threads each wait for each other
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield pool, count


def main(only: Literal["all", "train", "measure", "report"] = "all") -> None:
    """Train and measure what is missing, then write docs/comparison.md; or only one part of it."""
    console = Console()
    if only in ("all", "train"):
        train_missing(console)
    if only in ("all", "measure"):
        measure_missing(console)
    if only in ("all", "report"):
        write([entry for entry in plan() if entry.finished])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
