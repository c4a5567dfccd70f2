"""Hidden states of responses by Hugging Face's packed prefill and by vLLM's pooling engine: seconds of a batch, in turn.

    python benchmarks/scoring.py

float32, two threads, one process; every batch has new prompts, and medians leave the first two out. The 53M teacher of
``llamas.py`` (prompts of 128 tokens, 128 to score) and stories260K from the folder RAYKD_DATA (default
../shared; prompts of 64 tokens, 128 to score); "x 4" is four responses a prompt.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llamas import VOCABULARY, random_llama
from rich.console import Console
from rich.table import Table
from stamp import stamp

from raykd.experiment import EngineConfig, TeacherConfig
from raykd.records import Rollout, Source
from raykd.teacher import Teacher

THREADS, RESPONSE = 2, 128
STORIES = Path(os.environ.get("RAYKD_DATA", "../shared")) / "models/stories260K"
CASES: dict[str, dict[str, Any]] = {
    "53M": {"vocab": VOCABULARY, "prompt": 128, "prompts": 8, "samples": 1},
    "53M x 4": {"vocab": VOCABULARY, "prompt": 128, "prompts": 8, "samples": 4},
    "stories260K": {"vocab": 512, "prompt": 64, "prompts": 64, "samples": 1},
    "stories260K x 4": {"vocab": 512, "prompt": 64, "prompts": 16, "samples": 4},
}
RESULTS = Path(__file__).parent / "results" / "scoring.json"


def batch(case: dict[str, Any], generator: torch.Generator) -> list[Rollout]:
    """New prompts, each with its responses."""

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, case["vocab"], (count,), generator=generator).tolist())

    prompts = [ids(case["prompt"]) for _ in range(case["prompts"])]
    asked = [prompt for prompt in prompts for _ in range(case["samples"])]
    return [Rollout(prompt_id="", sample=0, prompt_tokens=p, tokens=ids(RESPONSE), source=Source.STUDENT) for p in asked]


def seconds(model: str, case: dict[str, Any], batches: int = 7) -> dict[str, float]:
    """The median of each back end."""
    length = case["prompt"] + RESPONSE
    config = TeacherConfig(dtype="float32", threads=THREADS, engine=EngineConfig(cpu_cache_gib=1))
    sizes = {"vocab_size": case["vocab"], "max_length": length}
    teachers = {name: Teacher(model, config.model_copy(update={"backend": name}), **sizes) for name in ("transformers", "vllm")}
    taken: dict[str, list[float]] = {name: [] for name in teachers}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(batches):
            for name, teacher in teachers.items():
                rollouts = batch(case, generator)
                started = time.perf_counter()
                teacher._states.of(rollouts)
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[2:]) for name, values in taken.items()}


def main() -> None:
    """Measure every case, print and keep the numbers."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(THREADS)
    table = Table("batch", "tokens scored", "transformers, s", "vLLM, s", "transformers / vLLM")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        random_llama("teacher", seed=0, sharpness=1.0).save_pretrained(folder)
        for name, case in CASES.items():
            found[name] = seconds(str(STORIES) if "stories" in name else folder, case)
            values = found[name]["transformers"], found[name]["vllm"]
            scored = case["prompts"] * case["samples"] * RESPONSE
            table.add_row(name, f"{scored:,}", *(f"{value:.3f}" for value in values), f"{values[0] / values[1]:.2f}")
    Console().print(table)
    RESULTS.write_text(json.dumps({"measured": stamp(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
