"""A whole run on one GPU that all share: SFT, GKD, MiniLLM with teacher-mixed sampling, from random weights to a saved student.

    python benchmarks/gpu_run.py                      one GPU of 40 GB or more, bfloat16
    python benchmarks/gpu_run.py --scale tiny         the same stages on two CPU cores

A learner rank, a teacher that scores and writes, and a rollout engine; on a GPU the engines sleep between the phases. Nothing is
downloaded: Dolly's rows and GPT-2's tokenizer come from RAYKD_DATA. Rates are a lane's own, tokens over the seconds in which it
worked, without the first phase of a stage, for which engines and programs are still made; "mismatch" is the largest difference
between the log-probs of engine and learner, nats a token, of any step whose weights are the engine's.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import AutoModelForCausalLM

from raykd.algorithms import GKD, SFT, MiniLLM
from raykd.algorithms.token_divergences import ReverseKL
from raykd.evaluation.suites import ALPACA
from raykd.experiment import (
    EngineConfig,
    EvaluationConfig,
    Experiment,
    LearnerConfig,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
    TrackingConfig,
)
from raykd.run import run
from raykd.tracking import read_lines

DATA = os.environ.get("RAYKD_DATA", "../shared")
LANES = {"write": "generate", "score": "score", "learn": "learn"}
RESULTS = Path(__file__).parent / "results" / "gpu_run.json"


def llama(width: int, layers: int, head: int = 64) -> Model:
    """A Llama from random weights; they are large, so that its distributions are far from flat."""
    scratch: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "num_key_value_heads": width // head,
        "max_position_embeddings": 512,
        "initializer_range": 0.04,
        "tie_word_embeddings": True,
    }
    return Model(path=f"{DATA}/models/gpt2-tokenizer", scratch=scratch)


@dataclass(frozen=True)
class Scale:
    """Models, responses of a step, tokens of a response, and where everybody runs."""

    teacher: Model
    student: Model
    batch: int
    response: int
    learner: LearnerConfig
    teachers: TeacherConfig
    rollout: RolloutConfig


ON_CPU = EngineConfig(dtype="float32", cpu_cache_gib=0.25)
SCALES = {
    "gpu": Scale(
        llama(1536, 16),
        llama(768, 12),
        64,
        128,
        LearnerConfig(gpus=0.35, zero_stage=1, micro_batch=32),
        TeacherConfig(gpus=0.35, engine=EngineConfig(memory=0.25), sleep=True),
        RolloutConfig(gpus=0.3, engine=EngineConfig(memory=0.2), sleep=True),
    ),
    "tiny": Scale(
        llama(64, 2, head=32),
        llama(32, 1, head=32),
        8,
        16,
        LearnerConfig(dtype="float32"),
        TeacherConfig(dtype="float32", engine=ON_CPU),
        RolloutConfig(engine=ON_CPU),
    ),
}


def experiment(scale: Scale, runs: Path) -> Experiment:
    """Three stages; each of the last two has more than one phase, so that engines wake with new weights."""
    batch, optimiser = scale.batch, Optimiser(learning_rate=1e-5)
    return Experiment(
        name="gpu-run",
        student=scale.student,
        teacher=scale.teacher,
        data=ALPACA.model_copy(update={"path": f"{DATA}/data/dolly/valid.jsonl"}),
        stages=(
            Stage(algorithm=SFT(), steps=4, batch_size=batch, optimiser=optimiser),
            Stage(algorithm=GKD(divergence=ReverseKL()), steps=4, batch_size=batch, optimiser=optimiser),
            Stage(
                algorithm=MiniLLM(rollouts=2 * batch, epochs=2, text_coefficient=0),
                steps=12,
                batch_size=batch,
                optimiser=optimiser,
            ),
        ),
        max_prompt=256,
        max_response=scale.response,
        learner=scale.learner,
        teachers=scale.teachers,
        rollout=scale.rollout,
        evaluation=EvaluationConfig(prompts=16),
        tracking=TrackingConfig(wandb=False),
        runs=runs,
    )


def rates(lines: Sequence[dict[str, Any]], first: int, last: int) -> dict[str, float]:
    """Of the steps after ``first``, up to ``last``: tokens a second of each lane, and seconds a step."""
    steps = {line["step"]: line for line in lines if "loss" in line}
    times, told = [steps[first]["seconds"], steps[last]["seconds"]], [steps[step] for step in range(first + 1, last + 1)]
    found = {"seconds_per_step": round((times[1] - times[0]) / (last - first), 3)}
    for lane, verb in LANES.items():
        seconds = sum(line.get(f"seconds/{verb}", 0.0) for line in told)
        if tokens := sum(line.get(f"tokens/{verb}", 0.0) for line in told):
            found[f"{lane}_tokens_per_second"] = round(tokens / seconds)
    fresh = [line["logprob_mismatch"] for line in told if "logprob_mismatch" in line and line.get("staleness") == 0]
    return found | ({"mismatch": round(max(fresh), 5)} if fresh else {})


def main() -> None:
    """Run it, load what it saved, print the rates and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="gpu")
    scale = parser.parse_args().scale
    with tempfile.TemporaryDirectory(prefix="raykd-") as folder:
        planned = experiment(SCALES[scale], Path(folder))
        started = time.monotonic()
        result = run(planned)
        seconds = time.monotonic() - started
        lines, _ = read_lines(result.folder / "metrics.jsonl")
        student = AutoModelForCausalLM.from_pretrained(result.student)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters()), "the saved student is no number"
    ends = accumulate((stage.steps for stage in planned.stages), initial=0)
    found = {
        type(stage.algorithm).__name__: rates(lines, before + stage.steps_per_phase, end)
        for stage, (before, end) in zip(planned.stages, pairwise(ends), strict=True)
    }
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    shown = Table("stage", *(name.replace("_", " ") for name in names), title=f"from the start to the end {seconds:.0f} s")
    for stage, row in found.items():
        shown.add_row(stage, *(f"{row[name]:,}" if name in row else "" for name in names))
    Console().print(shown)
    if scale == "gpu":
        held_out = {"before": result.before, "after": result.after}
        RESULTS.write_text(
            json.dumps({"measured": stamp(), "seconds": round(seconds), "stages": found, "held_out": held_out}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
