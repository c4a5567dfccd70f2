"""Who was busy, who waited, and what held a run up."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raykd.tracking import read_lines

LANES = {
    "rollout": ("generate", "load", "sleep"),
    "teacher": ("score",),
    "reward": ("rate",),
    "learner": ("learn", "publish", "evaluate", "save"),
}
"""Who is busy with which verbs."""
HELP = {
    "rollout": "the rollout replicas: more of them would help",
    "teacher": "the teacher replicas: more of them would help",
    "reward": "the reward, which has one actor: a cheaper reward would help",
}
"""Whom the learner waits for, and what shortens that."""
WAITED_LITTLE = 0.1
"""Share of the learner's time below which waiting is not what holds a run up."""


@dataclass(slots=True)
class Span:
    """A verb while it runs."""

    tokens: int = 0
    """Response tokens, known at its end."""


class Usage:
    """Seconds and response tokens of each verb. A verb that runs while others take what was counted is counted up to there: the
    time of a step is that step's, whoever worked ahead. One that runs for several phases at the same time is counted once."""

    def __init__(self, lanes: Collection[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self._lanes, self._clock = lanes, clock
        self._running: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        """Up to when a verb that runs is counted."""
        self._counted: dict[str, float] = {}
        self._taken = clock()
        self._lock = threading.Lock()  # phases are written and scored beside the learner's steps

    @contextmanager
    def measured(self, verb: str) -> Iterator[Span]:
        """Counts the time in it."""
        span = Span()
        with self._lock:
            if not self._running[verb]:
                self._since[verb] = self._clock()
            self._running[verb] += 1
        try:
            yield span
        finally:
            with self._lock:
                self._count(verb, span.tokens)
                self._running[verb] -= 1

    def take(self) -> dict[str, float]:
        """Since the last call: ``seconds/<verb>``, response ``tokens/<verb>``, and for every lane ``waiting/<lane>`` seconds."""
        with self._lock:
            for verb in +self._running:
                self._count(verb)
            counted, self._counted = self._counted, {}
            now = self._clock()
            wall, self._taken = now - self._taken, now
        waiting = {f"waiting/{lane}": max(0.0, wall - busy(counted, lane)) for lane in self._lanes}
        return {name: amount for name, amount in counted.items() if amount} | waiting

    def _count(self, verb: str, tokens: int = 0) -> None:
        now = self._clock()
        for name, amount in ((f"seconds/{verb}", now - self._since[verb]), (f"tokens/{verb}", tokens)):
            self._counted[name] = self._counted.get(name, 0.0) + amount
        self._since[verb] = now


def busy(numbers: Mapping[str, float], lane: str) -> float:
    """Seconds that a lane worked."""
    return sum(numbers.get(f"seconds/{verb}", 0.0) for verb in LANES[lane])


def shares(numbers: Mapping[str, float]) -> dict[str, float]:
    """The share of its time that each lane worked."""
    times = {lane: (busy(numbers, lane), numbers[f"waiting/{lane}"]) for lane in LANES if f"waiting/{lane}" in numbers}
    return {lane: worked / (worked + waited) for lane, (worked, waited) in times.items() if worked + waited > 0}


def throughput(run: Path) -> dict[str, float]:
    """Response tokens per second of each verb over the whole run, from its ``metrics.jsonl``."""
    sums = _sums(run)
    verbs = [name.removeprefix("tokens/") for name in sums if name.startswith("tokens/")]
    return {verb: sums[f"tokens/{verb}"] / sums[f"seconds/{verb}"] for verb in verbs}


def advice(run: Path, max_staleness: int, in_flight: bool) -> str:
    """One sentence on what held a run up, from the busy times in its ``metrics.jsonl``."""
    sums = _sums(run)
    waited, worked = sums.get("seconds/wait", 0.0), busy(sums, "learner")
    if waited + worked == 0:
        return "no step was taken"
    slowest = max(HELP, key=lambda lane: busy(sums, lane))
    share = waited / (waited + worked)
    if share < WAITED_LITTLE:
        return f"the learner waited {share:.0%} of the time: more learner ranks would help, more replicas would not"
    if busy(sums, slowest) == 0:
        return f"the learner waited {share:.0%} of the time, for no rollout, teacher or reward: replicas would not help"
    otherwise = ""
    if not max_staleness:
        otherwise = ", or max_staleness 1 lets the learner work meanwhile"
    elif slowest == "rollout" and not in_flight:
        otherwise = ", or in_flight keeps them busy while a phase's longest responses are written"
    return f"the learner waited {share:.0%} of the time, mostly for {HELP[slowest]}{otherwise}"


def _sums(run: Path) -> dict[str, float]:
    """Everything timed, added up over all steps."""
    sums: dict[str, float] = {}
    for line in read_lines(run / "metrics.jsonl")[0]:
        for name, value in line.items():
            if name.startswith(("seconds/", "tokens/")):
                sums[name] = sums.get(name, 0.0) + value
    return sums
