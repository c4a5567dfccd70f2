"""A weight publish of a 1.2-billion-parameter Llama on CPU, learner to vLLM engine, beside a plain copy of the same bytes.

    python benchmarks/publish.py [--small]

    write              learner -> memory that the node shares: one copy, summed up on the way
    check              the engine's process, an actor of its own: the checksum, before anything changes (reads once)
    install            shared memory -> the kernels' own memory (one copy, most of it transposing blocks of 4-byte words)

The learner goes on changing its weights while the engine writes with them, so both hold their own. Medians of nine, copy and
publish in turn, after two publishes that are not counted: vLLM's own reload, which the engine watches, and the first in place.
As in a run, a version stays until the next one is loaded: two are in memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.fleet import environment
from raykd.rollout.config import EngineSettings
from raykd.weights import Shelves, WeightUpdate, grouped

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
REPEATS, THREADS = 9, 2
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
        """Seconds to check, seconds to install."""
        from raykd.rollout.vllm_engine import check

        started = time.perf_counter()
        await check(update)
        between = time.perf_counter()
        await self._engine.install(update)
        return between - started, time.perf_counter() - between


def main() -> None:
    """Publish, copy, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model: to see that it runs")
    config = LlamaConfig(**(SMALL if parser.parse_args().small else LARGE), vocab_size=32_000, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    num_bytes = sum(sizes.values())
    ray.init("local", include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="raykd-publish-") as folder:
        model.save_pretrained(folder)
        engine = Engine.options(runtime_env={"env_vars": environment(THREADS, on_cpu=True)}).remote(folder)
        ray.get(engine.ready.remote())
    source = torch.empty(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(0)
    place = source
    for parameter in model.parameters():  # the model itself is the plain copy's source: beside another the memory is short
        parts = place.split([parameter.nbytes, place.nbytes - parameter.nbytes])
        parameter.data, place = parts[0].view(parameter.dtype).view(parameter.shape).copy_(parameter.data), parts[1]
    seconds: dict[str, list[float]] = {"plain copy": [], "write": [], "check": [], "install": []}
    shelves = Shelves()
    for version in range(1, REPEATS + 3):
        started = time.perf_counter()
        target.copy_(source)
        copied = time.perf_counter()
        tensors = model.state_dict()
        groups = ([(name, tensors[name]) for name in group] for group in grouped(sizes))
        update = shelves.publish(version, groups, sizes.values(), held=[version - 1])
        written = time.perf_counter()
        checked, installed = ray.get(engine.load.remote(update))
        if version > 2:
            for name, value in zip(seconds, (copied - started, written - copied, checked, installed), strict=True):
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    total = sum(medians.values()) - medians["plain copy"]
    table = Table("part", "seconds", "of a plain copy", title=f"{num_bytes / 2**30:.2f} GiB, bfloat16")
    for name, value in [*medians.items(), ("publish, whole", total)]:
        table.add_row(name, f"{value:.3f}", f"{value / medians['plain copy']:.1f}x")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    ratio = total / medians["plain copy"]
    found = {"measured": stamp(), "bytes": num_bytes, "seconds": medians, "publish": total, "copies": ratio}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
