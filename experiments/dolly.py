"""databricks-dolly-15k as MiniLLM, DistiLLM and AKL train on it: data, lengths, schedules, layouts of GPUs.

As in the papers, an initial fine-tuning hands on the weights of lowest cross-entropy, and a method those of highest Rouge-L, on
1,000 held-out prompts, measured once an epoch. The tables' numbers are measured afterwards, by ``raykd evaluate``.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

from raykd.algorithms import SFT, AnyAlgorithm, MiniLLM
from raykd.experiment import (
    EvaluationConfig,
    Experiment,
    LearnerConfig,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
)
from raykd.sources import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Documents, Pairs

DOLLY = Pairs(
    path="databricks/databricks-dolly-15k",
    split="train[500:]",  # the first 500 rows are MiniLLM's test set
    prompt=ALPACA_WITH_INPUT.replace("{input}", "{context}"),
    prompt_without_input=ALPACA_WITHOUT_INPUT,
    response="{response}",
)
OPENWEBTEXT = Documents(path="Skylion007/openwebtext", limit=200_000)
TRAINING_ROWS = 11_500
"""To train on: 14,511 without those held out and those whose prompt is longer than 256 tokens."""
EPOCH = TRAINING_ROWS // 32
"""Steps."""


class Layout(NamedTuple):
    """How the GPUs of a node, 80 GB each, are shared out: one actor a GPU."""

    learner: LearnerConfig
    teachers: TeacherConfig
    rollout: RolloutConfig


SMALL = Layout(
    LearnerConfig(ranks=2, gpus=1, zero_stage=1, micro_batch=16),
    TeacherConfig(replicas=1, gpus=1),
    RolloutConfig(replicas=1, gpus=1),
)
"""Four GPUs, for students to 1.5 billion parameters and teachers to three."""
LARGE = Layout(
    LearnerConfig(ranks=4, gpus=1, zero_stage=3, micro_batch=4, activation_checkpointing=True),
    TeacherConfig(replicas=2, gpus=1),
    RolloutConfig(replicas=2, gpus=1),
)
"""Eight GPUs, for students to seven billion parameters and teachers to thirteen."""
TRAINING_ONLY = Layout(
    LearnerConfig(ranks=7, gpus=1, zero_stage=3, micro_batch=5, activation_checkpointing=True),
    TeacherConfig(),
    RolloutConfig(replicas=1, gpus=1),
)
"""Eight GPUs, where nobody scores and only held-out prompts are answered."""


def dolly(name: str, *stages: Stage, student: str, teacher: str | None, layout: Layout, measure_every: int = EPOCH) -> Experiment:
    """Stages on Dolly, with MiniLLM's template, lengths and seed; measured every so many steps."""
    return Experiment(
        name=name,
        teacher=Model(path=teacher) if teacher else None,
        student=Model(path=student),
        data=DOLLY,
        text=OPENWEBTEXT if any(stage.algorithm.text for stage in stages) else None,
        text_length=512,
        max_prompt=256,
        max_response=256,
        stages=stages,
        evaluation=EvaluationConfig(prompts=1_000, every=measure_every),
        seed=10,
        **layout._asdict(),
    )


def epochs(algorithm: AnyAlgorithm, count: int, learning_rate: float, batch_size: int = 32) -> Stage:
    """Passes over Dolly under optimiser and schedule of MiniLLM's and DistiLLM's fine-tuning scripts, which set AdamW's rate and
    decay alone. Unlike theirs, the student learns without the dropout of its configuration, 0.1 for GPT-2 and OPT."""
    optimiser = Optimiser(
        learning_rate=learning_rate, schedule="cosine", learning_rate_min=1e-7, betas=(0.9, 0.999), weight_decay=1e-2
    )
    steps = count * TRAINING_ROWS // batch_size
    return Stage(algorithm=algorithm, steps=steps, batch_size=batch_size, optimiser=optimiser, keep="rouge_l")


def first_sft(learning_rate: float) -> Stage:
    """The fine-tuning before a method."""
    return epochs(SFT(), 3, learning_rate).model_copy(update={"keep": "loss"})


def minillm(schedule: Literal["constant", "cosine"]) -> Stage:
    """MiniLLM's second phase: steps and batch are the paper's, the schedule of the rate its code's."""
    optimiser = Optimiser(learning_rate=5e-6, schedule=schedule, warmup_steps=100, weight_decay=1e-6)
    return Stage(algorithm=MiniLLM(), steps=5_000, batch_size=64, optimiser=optimiser, keep="rouge_l")


def fine_tuned(size: str) -> str:
    """What ``sft_dolly.py --scale SIZE`` leaves."""
    return str(Path(os.environ.get("RAYKD_RUNS", "runs")).absolute() / f"sft-{size}" / "student")
