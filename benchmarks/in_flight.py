"""Tokens per second that engines write, phase by phase, with new weights for each: one phase after another, or some in flight.

    python benchmarks/in_flight.py [--batches 8 32] [--dtype bfloat16] [--shares 0 0.2]

The stages' ``in_flight``: an engine that waits for the last token of a phase before it takes new weights has ever fewer responses
to write; in flight it has those of the next phases, and takes the weights between two steps. Models, lengths (as Dolly's answers,
at most 256 tokens) and actors as in ``rollout.py``. Whoever learns takes no time here: the next phase is begun as soon as one is
written, the same for all, so that at most ``ahead`` + 1 are under way. All take turns within each repeat, medians are reported.
"""

import argparse
import json
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import ray
from folders import temporary
from rich.console import Console
from rich.table import Table
from rollout import LENGTHS, Prompts, draw_prompts, requests_for, start
from stamp import stamp
from transformers import AutoModelForCausalLM

from raykd.weights import Shelves, WeightUpdate

AHEAD = {"one after another": 0, "1 ahead, in flight": 1, "2 ahead, in flight": 2}
PHASES, REPEATS = 12, 3
RESULTS = Path(__file__).parent / "results" / "in_flight.json"


class Publisher:
    """The learner's weights, which stay what they are, as ever new versions."""

    def __init__(self, folder: Path, dtype: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._named = list(model.named_parameters())
        self._shelves, self._version = Shelves(), 0

    def publish(self) -> WeightUpdate:
        """The next version."""
        self._version += 1
        return self._shelves.publish(self._version, iter([self._named]), [tensor.nbytes for _, tensor in self._named])


def measure(student: Any, teacher: Any, publisher: Publisher, prompts: Prompts, share: float, ahead: int) -> float:
    """Tokens per second of phases that answer all ``prompts`` each; the last ones, beside which none is begun, count as well."""
    under_way: deque[Any] = deque()
    started, written = time.perf_counter(), 0
    for phase in range(PHASES):
        if len(under_way) > ahead:
            written += ray.get(under_way.popleft())
        ray.get(student.load.remote(publisher.publish(), in_flight=ahead > 0))
        under_way.append(student.mix.remote(requests_for(prompts, phase), share, LENGTHS["uneven"][0], teacher))
    written += sum(ray.get([*under_way]))
    return written / (time.perf_counter() - started)


def main() -> None:
    """Measure every batch and share, print the table, write it as JSON beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    ray.init("local", include_dashboard=False, log_to_driver=False)
    folder = temporary("in-flight")
    student, teacher = start(folder, options.dtype, "uneven")
    publisher = Publisher(folder / "student", options.dtype)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table = Table("batch", "teacher's share", *AHEAD, caption="tokens a second")
    for batch in options.batches:
        prompts = draw_prompts(batch)
        for share in options.shares:
            rates: dict[str, list[float]] = {way: [] for way in AHEAD}
            for repeat in range(REPEATS + 1):
                for way, ahead in AHEAD.items():
                    rate = measure(student, teacher, publisher, prompts, share, ahead)
                    if repeat:  # the first of each size is slow
                        rates[way].append(rate)
            found = {way: statistics.median(values) for way, values in rates.items()}
            row = {"measured": stamp(), "repeats": REPEATS, "tokens_per_second": found}
            results[f"{options.dtype} {batch} share {share:g}"] = row
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            base, *others = found.values()
            table.add_row(str(batch), f"{share:g}", f"{base:,.0f}", *(f"{rate:,.0f} ({rate / base:.2f} x)" for rate in others))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
