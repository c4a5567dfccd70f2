"""A weight publish of a 1.1-billion-parameter Llama on CPU, learner to vLLM engine, beside a plain copy of the same bytes.

    python benchmarks/publish.py [--small]

    sum and put        learner -> shared memory: a checksum (reads the bytes once), then Ray's object store (one copy)
    fetch and check    the engine's process, an actor of its own: the checksum again, before anything changes (reads once)
    install            shared memory -> the kernels' own memory (one copy, most of it transposing blocks of 4-byte words)

The floor is two copies and two readings, about 2.8 plain copies where memory is the limit: the learner goes on changing its
weights while the engine writes with them, so both hold their own. Medians of five, copy and publish in turn, after two publishes
that are not counted: vLLM's own reload, which the engine watches, and the first in place.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.rollout.config import EngineSettings
from raykd.weights import WeightUpdate, pack

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
REPEATS, THREADS = 5, 2
RESULTS = Path(__file__).parent / "results" / "publish.json"


@ray.remote(num_cpus=0)
class Engine:
    """A vLLM engine that times the two halves of a load."""

    def __init__(self, folder: str) -> None:
        from raykd.rollout.vllm_engine import VllmEngine

        settings = EngineSettings(max_length=64, dtype="bfloat16", cpu_cache_gib=0.25, max_sequences=4, threads=THREADS)
        self._engine = VllmEngine(folder, settings, eos_token_ids=[2])

    async def ready(self) -> None:
        """It has its initial weights."""

    async def load(self, update: WeightUpdate) -> tuple[float, float]:
        """Seconds to fetch and check, seconds to install."""
        from raykd.rollout.vllm_engine import fetch_buckets

        started = time.perf_counter()
        fetched = await asyncio.gather(*update.buckets)
        buckets = await fetch_buckets(
            WeightUpdate(version=update.version, buckets=tuple(fetched), bytes=0), lambda bucket: bucket
        )
        between = time.perf_counter()
        await self._engine.install(update.version, buckets)
        return between - started, time.perf_counter() - between


def main() -> None:
    """Publish, copy, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small model: to see that it runs")
    config = LlamaConfig(**(SMALL if parser.parse_args().small else LARGE), vocab_size=32_000, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    ray.init("local", log_to_driver=False, object_store_memory=int(2.5 * num_bytes) + 2**28)
    with tempfile.TemporaryDirectory(prefix="raykd-publish-") as folder:
        model.save_pretrained(folder)
        engine = Engine.remote(folder)
        ray.get(engine.ready.remote())
    source = torch.empty(num_bytes, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source).fill_(0)
    seconds: dict[str, list[float]] = {"plain copy": [], "sum and put": [], "fetch and check": [], "install": []}
    for version in range(1, REPEATS + 3):
        started = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        buckets = tuple(ray.put(bucket) for bucket in pack(model.state_dict().items()))
        put = time.perf_counter()
        fetched, installed = ray.get(engine.load.remote(WeightUpdate(version=version, buckets=buckets, bytes=num_bytes)))
        if version > 2:
            for name, value in zip(seconds, (copied - started, put - copied, fetched, installed), strict=True):
                seconds[name].append(value)
        del buckets
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    total = sum(medians.values()) - medians["plain copy"]
    table = Table("part", "seconds", "of a plain copy", title=f"{num_bytes / 2**30:.2f} GiB, bfloat16")
    for name, value in [*medians.items(), ("publish, whole", total)]:
        table.add_row(name, f"{value:.3f}", f"{value / medians['plain copy']:.1f}x")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    ratio = total / medians["plain copy"]
    RESULTS.write_text(json.dumps({"bytes": num_bytes, "seconds": medians, "publish": total, "copies": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
