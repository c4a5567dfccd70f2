"""Teacher -> learner: bytes per response token and tokens per second of every payload, through Ray's object store.

    python benchmarks/wire.py [--tokens 2048] [--blocks 6]

A teacher of 13B's shape (width 5,120, bfloat16) over vocabularies of 32,000 and 151,936. One actor makes blocks of scores, as a
teacher's actor does, another fetches them and reads every byte once, as a learner's rank does; the driver passes references on
and never holds a tensor. "planned" is the arithmetic that chooses the payload, "measured" the size of the stored object. The
sampled log-probs travel by value inside the rows.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.experimental import get_object_locations
from rich.console import Console
from rich.table import Table
from stamp import stamp

from raykd.payloads import payload_bytes
from raykd.records import Scores
from raykd.sharing import checksum

WIDTH, DTYPE, PROBE_BYTES = 5120, torch.bfloat16, 8
VOCABULARIES = (32_000, 151_936)
LARGEST = 256 << 20
"""Bytes of a block: with wide logits it holds fewer tokens."""
RESULTS = Path(__file__).parent / "results" / "wire.json"


class Teacher:
    """Makes blocks of scores once, and puts a copy into the store when asked."""

    def __init__(self, payload: str, vocab_size: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        width, dtype = (WIDTH, DTYPE) if payload == "hidden" else (vocab_size, torch.float32)
        sent = {} if payload == "sampled" else {payload: torch.randn(tokens, width, generator=generator).to(dtype)}
        probe = torch.randn(2, tokens, generator=generator)
        self._scores = Scores(offsets=(0, tokens), log_normaliser=probe[0].clone(), logprobs=probe[1].clone(), **sent)
        self._sampled = payload == "sampled"

    def score(self) -> tuple[Scores | None, list[float] | None]:
        """What the actor of a run returns: the block, or the sampled log-probs."""
        return (None, self._scores.logprobs.tolist()) if self._sampled else (self._scores, None)


class Learner:
    """Fetches a block in place and reads it once."""

    def read(self, answer: list[Any]) -> float:
        """The sum of all words that arrived."""
        if isinstance(answer[0], float):
            return sum(answer)
        scores: Scores = ray.get(answer[0])
        payload = scores.logits if scores.hidden is None else scores.hidden
        assert payload is not None
        return checksum(payload.view(torch.uint8).numpy().reshape(-1)) + float(scores.logprobs.sum())


def measure(payload: str, vocab_size: int, tokens: int, blocks: int) -> dict[str, float]:
    """Medians over the blocks; the first is not counted."""

    def start(actor_class: Any, *arguments: Any) -> Any:
        return ray.remote(actor_class).options(num_cpus=0).remote(*arguments)

    teacher, learner = start(Teacher, payload, vocab_size, tokens), start(Learner)
    seconds, sizes, memory = [], [], []
    for _ in range(blocks + 1):
        started = time.perf_counter()
        block, sampled = teacher.score.options(num_returns=2).remote()
        answer = ray.get(sampled) or [block]
        ray.get(learner.read.remote(answer))
        seconds.append(time.perf_counter() - started)
        stored = isinstance(answer[0], ray.ObjectRef)
        sizes.append(get_object_locations(answer)[answer[0]]["object_size"] if stored else 4 * tokens)
        memory.append(psutil.Process().memory_info().rss)
    ray.kill(teacher)
    ray.kill(learner)
    planned = 4 if payload == "sampled" else payload_bytes(WIDTH, vocab_size, DTYPE)[payload] + PROBE_BYTES
    measured = statistics.median(sizes) / tokens
    assert abs(measured - planned) < 0.01 * planned + 1, f"{payload}: planned {planned} bytes a token, stored {measured}"
    return {
        "planned_bytes_per_token": planned,
        "measured_bytes_per_token": round(measured, 1),
        "tokens_per_second": round(tokens / statistics.median(seconds[1:])),
        "megabytes_per_second": round(measured * tokens / statistics.median(seconds[1:]) / 1e6),
        "driver_growth_megabytes": round((memory[-1] - memory[1]) / 1e6, 1),
    }


def main() -> None:
    """Measure every payload, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of a block")
    parser.add_argument("--blocks", type=int, default=6)
    options = parser.parse_args()
    ray.init("local", log_to_driver=False, object_store_memory=3 << 30)
    cases = [("sampled", 32_000), ("hidden", 32_000), *(("logits", vocab_size) for vocab_size in VOCABULARIES)]
    results: dict[str, Any] = {}
    shown = Table("payload", "vocabulary", "bytes/token planned", "measured", "tokens/s", "MB/s", "driver grows, MB")
    for payload, vocab_size in cases:
        row = measure(payload, vocab_size, min(options.tokens, LARGEST // (4 * vocab_size)), options.blocks)
        name = f"{vocab_size:,}" if payload == "logits" else "any"
        results[f"{payload}, vocabulary {name}"] = row
        shown.add_row(payload, name, *(f"{value:,}" for value in row.values()))
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"measured": stamp(), "tokens": options.tokens, "width": WIDTH, "results": results}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    Console().print(shown)


if __name__ == "__main__":
    main()
