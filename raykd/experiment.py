"""What a run is: one frozen, validated value, to and from JSON. Impossible settings cannot be written.

Workers never see an ``Experiment``; each gets its own small part of it.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raykd.algorithms import AnyAlgorithm, DistiLLM
from raykd.algorithms.base import Needs, Replay
from raykd.prompts import Documents, Pairs
from raykd.records import Source

Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16"]
Kept = Literal["last", "loss", "forward_kl", "reverse_kl", "rouge_l"]
"""The last weights of a stage, or the best by a held-out number."""
HIGHER_IS_BETTER = frozenset({"rouge_l"})
MEMORY_OF_TWO = 0.45
"""Largest share of a GPU for each of two engines: the head's products want some, too."""
TEACHER_WRITES = frozenset({Source.MIXED, Source.TEACHER})
"""Responses for which the teacher needs an engine of its own."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Value):
    """A causal language model: a folder or a name on the Hub."""

    path: str
    """Weights, configuration and tokenizer; with ``scratch``, the tokenizer alone."""
    scratch: dict[str, Any] | None = None
    """Architecture to initialise at random, as fields of a Hugging Face configuration: ``{"model_type": "llama", ...}``."""


class Optimiser(_Value):
    """AdamW and its learning-rate schedule over the steps of one stage."""

    learning_rate: float = Field(default=5e-6, gt=0)
    learning_rate_min: float = Field(default=0.0, ge=0)
    """Where a cosine or linear schedule ends."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    gradient_limit: float = Field(default=1e4, gt=0)
    """A gradient whose norm is beyond it, or not a number, means nothing whatever it is clipped to: the step is skipped."""
    max_skipped: Positive = 10
    """So many steps skipped in a row end the run."""


class Stage(_Value):
    """One algorithm for a number of optimiser steps. Its optimiser starts afresh."""

    algorithm: AnyAlgorithm
    steps: Positive
    batch_size: Positive = 64
    """Responses per optimiser step, over all ranks."""
    samples_per_prompt: Positive = 1
    max_staleness: int = Field(default=0, ge=0)
    """Phases that are written and scored ahead of the learner, while it learns from earlier ones. 0: everything in turn."""
    replay: Replay | None = None
    """How long responses are kept for another use, in place of the algorithm's own bounds. ``samples_per_insert`` is then the
    number of passes over a phase's responses; without it, batches are drawn from all that are held."""
    optimiser: Optimiser = Optimiser()
    keep: Kept = "last"
    """Which weights leave the stage: the last, or those that were best by this held-out number, at a multiple of
    ``evaluation.every`` steps or at the end."""

    @property
    def rows_per_phase(self) -> int:
        """Responses written before learning from them."""
        return max(self.batch_size, self.algorithm.rollouts_per_phase or 0)

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps between two calls to the rollout fleet."""
        passes = (self.replay.samples_per_insert if self.replay else None) or self.algorithm.inner_epochs
        return self.rows_per_phase // self.batch_size * passes

    @property
    def bounds(self) -> Replay:
        """Of the replay buffer: the stage's, else the algorithm's own, else every response is used in its phase alone."""
        for_a_phase = Replay(
            capacity=self.rows_per_phase,
            max_staleness=self.steps_per_phase * (self.max_staleness + 1),
            samples_per_insert=self.algorithm.inner_epochs,
        )
        return self.replay or self.algorithm.replay or for_a_phase

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.rows_per_phase % self.batch_size:
            raise ValueError(
                f"rollouts_per_phase {self.rows_per_phase} is no multiple of batch_size {self.batch_size}: "
                "some responses would never be learned from; change one of them"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt} does not divide batch_size {self.batch_size}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _replayable(self) -> Self:
        if self.replay is None:
            return self
        oldest = self.steps_per_phase * (self.max_staleness + 1) - 1
        stays = oldest if self.replay.max_staleness is None else self.replay.max_staleness
        if self.replay.capacity < self.rows_per_phase or stays < oldest:
            raise ValueError(
                f"replay would lose responses before they are learned from: a phase writes {self.rows_per_phase}, and the last "
                f"of them is used {oldest} steps later; raise replay.capacity and replay.max_staleness to that at least"
            )
        writers = {Source.STUDENT if writer is Source.MIXED else writer for writer in self.algorithm.writers}
        if unwritten := {author for author, share in (self.replay.shares or {}).items() if share} - writers:
            raise ValueError(
                f"replay.shares names {', '.join(sorted(unwritten))}, which {type(self.algorithm).__name__} has nobody write"
            )
        return self


class EngineConfig(_Value):
    """One vLLM engine."""

    dtype: Dtype = "bfloat16"
    tensor_parallel: Positive = 1
    memory: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache."""
    cpu_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache on machines without a GPU, GiB."""
    max_sequences: Positive = 256
    """Sequences decoded together."""
    threads: Positive = 1
    """CPU threads of the engine, where there is no GPU."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one response."""


class _Replicas(_Value):
    """Interchangeable workers with vLLM engines."""

    replicas: Positive = 1
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each replica; 0 runs on CPU."""
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if 0 < self.gpus < self.engine.tensor_parallel:
            raise ValueError(
                f"engine.tensor_parallel {self.engine.tensor_parallel} takes as many GPUs, gpus gives a replica {self.gpus:g}; "
                "change one of them"
            )
        return self


class RolloutConfig(_Replicas):
    """Student engines that write responses."""


class TeacherConfig(_Replicas):
    """Workers that score responses, and write the teacher's tokens where an algorithm mixes."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """What computes the teacher's hidden states. "vllm" is a pooling engine: tensor parallelism, quantised checkpoints."""
    dtype: Dtype = "bfloat16"
    batch_tokens: Positive = 16384
    """Positions of one scoring forward pass, padding included."""
    chunk: Positive = 1024
    """Positions whose distributions exist at the same time."""
    payload: Literal["auto", "hidden", "logits"] = "auto"
    """What travels of a distribution: the last hidden state or the logits, both exact; "auto" sends the fewer bytes."""
    engine: EngineConfig = EngineConfig(memory=0.5)
    """Of the engine that writes, started only where an algorithm mixes teacher tokens in, and of the one that scores for the
    back end "vllm", in the scorer's ``dtype``: two engines, each with these settings and its own copy of the weights."""
    threads: Positive = 1


class FunctionReward(_Value):
    """A Python function ``reward(prompts: list[str], responses: list[str]) -> list[float]``."""

    kind: Literal["function"] = "function"
    name: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """``package.module:function`` or ``folder/file.py:function``, importable where the workers run."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the rewards of a phase."""


class ClassifierReward(_Value):
    """A Hugging Face sequence classifier on prompt and response: the log-probability of one label, or its single logit."""

    kind: Literal["classifier"] = "classifier"
    path: str
    """Folder or Hub name."""
    label: int = Field(default=0, ge=0)
    batch_size: Positive = 16
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the rewards of a phase."""


RewardConfig = Annotated[FunctionReward | ClassifierReward, Field(discriminator="kind")]


class LoRA(_Value):
    """Low-rank adaptation (arXiv 2106.09685): of a layer's weight W + (alpha / rank) B A, only A and B are learned."""

    rank: int = Field(default=0, ge=0)
    """Of the update of each adapted layer, e.g. 16; 0 learns all weights and no adapters."""
    alpha: float = Field(default=64.0, gt=0)
    """That of DistiLLM's public code, for rank 16."""
    targets: tuple[str, ...] = ()
    """Linear layers to adapt, by the last part of their names, e.g. q_proj and v_proj; none named: all but the head, as
    QLoRA found necessary (arXiv 2305.14314, section 4)."""


class LearnerConfig(_Value):
    """DeepSpeed ranks."""

    ranks: Positive = 1
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each rank; 0 runs on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Dtype = "bfloat16"
    micro_batch: Positive = 8
    """Sequences of one forward and backward pass on one rank."""
    chunk: Positive = 1024
    """Positions whose distributions exist at the same time."""
    lora: LoRA = LoRA()
    activation_checkpointing: bool = False
    offload_optimiser: bool = False
    threads: Positive = 1
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait of one rank for another."""


class EvaluationConfig(_Value):
    """Held-out measures of the student against the teacher, before, between and after the stages."""

    prompts: int = Field(default=64, ge=0)
    """Held-out prompts; they are taken from the data and never trained on. 0 measures nothing."""
    every: int = Field(default=0, ge=0)
    """Also every so many steps within a stage; 0 only between stages."""
    samples: int = Field(default=4, ge=0)
    """Of the student's answers to them, so many are kept as text each time, in ``samples.jsonl``."""


class TrackingConfig(_Value):
    """Where numbers go beside ``metrics.jsonl``."""

    wandb: bool = True
    """Weights & Biases: online when a key is set, files in the run directory otherwise."""
    project: str = "raykd"


class Experiment(_Value):
    """A training run: models, data, stages, and the machines they run on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    student: Model
    teacher: Model | None = None
    """None where no stage needs one (SFT)."""
    data: Pairs | Documents
    text: Documents | None = None
    """Plain text for the language-modelling loss of methods that have one."""
    text_length: int = Field(default=512, ge=2)
    """Tokens of one chunk of plain text."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    reward: RewardConfig | None = None
    """What rates the student's responses, for methods that add a reward to the distillation."""
    max_prompt: Positive = 256
    """Longest prompt, tokens; longer ones are left out."""
    max_response: Positive = 256
    """Longest response, tokens; longer ones are cut."""
    rollout: RolloutConfig = RolloutConfig()
    teachers: TeacherConfig = TeacherConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimiser steps between checkpoints; 0 only at the end of each stage."""
    seed: int = Field(default=0, ge=0)
    runs: Path = Field(default_factory=lambda: Path(os.environ.get("RAYKD_RUNS", "runs")))
    """Folder of run directories, each run gets a new one in it. On several machines: storage that all of them see.
    Defaults to the environment variable RAYKD_RUNS, else ``runs``."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for index, stage in enumerate(self.stages):
            algorithm, where = stage.algorithm, f"stages.{index}: {type(stage.algorithm).__name__}"
            text = algorithm.text
            needs = {algorithm.needs} | ({text.algorithm.needs} if text else set())
            if self.teacher is None and (needs != {Needs.NOTHING} or algorithm.writers & TEACHER_WRITES):
                raise ValueError(f"{where} needs a teacher, but teacher is not set; name a model")
            if self.text is None and text is not None:
                raise ValueError(
                    f"{where} has text_coefficient {text.weight:g}, but text is not set; "
                    "name plain text, or set text_coefficient to 0"
                )
            if Source.DATASET in algorithm.writers and isinstance(self.data, Pairs) and self.data.response is None:
                raise ValueError(f"{where} learns from reference answers, but data.response is not set; name the field")
            if algorithm.needs_reward and self.reward is None:
                raise ValueError(f"{where} has a reward_weight, but reward is not set; name a function or a classifier")
            if isinstance(algorithm, DistiLLM) and algorithm.schedule.step > 0:
                self._measures("loss", f"{where} raises its share of student text by", "set schedule.step to 0")
            if stage.keep != "last":
                self._measures(stage.keep, f"stages.{index} keeps the best weights by", "set keep to last")
        teachers = self.teachers
        if teachers.backend == "vllm" and teachers.gpus and self.mixes() and teachers.engine.memory > MEMORY_OF_TWO:
            raise ValueError(
                f"teachers.engine.memory {teachers.engine.memory:g} is taken twice, by the engine that scores and the one that "
                f"writes; lower it to {MEMORY_OF_TWO:g}, or set teachers.backend to transformers"
            )
        if self.learner.ranks > min(stage.batch_size for stage in self.stages):
            raise ValueError(
                f"learner.ranks {self.learner.ranks} is more than the smallest batch_size of the stages; use fewer ranks"
            )
        return self

    def _measures(self, measure: Kept, who: str, otherwise: str) -> None:
        """Whether a held-out number exists within a stage."""
        evaluation = self.evaluation
        if not evaluation.every or not evaluation.prompts:
            raise ValueError(
                f"{who} the held-out {measure}, but evaluation.every is {evaluation.every} and evaluation.prompts "
                f"{evaluation.prompts}; set both, or {otherwise}"
            )
        if measure != "reverse_kl" and isinstance(self.data, Pairs) and self.data.response is None:
            raise ValueError(
                f"{who} the held-out {measure} of reference answers, but data.response is not set; name the field, or {otherwise}"
            )
        if measure in ("forward_kl", "reverse_kl") and self.teacher is None:
            raise ValueError(f"{who} the held-out {measure}, but teacher is not set; name a model, or {otherwise}")

    @property
    def max_length(self) -> int:
        """Longest prompt and response together, tokens."""
        return self.max_prompt + self.max_response

    def mixes(self) -> bool:
        """Whether any stage has the teacher write tokens."""
        return any(stage.algorithm.writers & TEACHER_WRITES for stage in self.stages)

    def samples(self) -> bool:
        """Whether responses are written that are not in the data: to learn from, or to be measured."""
        measured = self.teacher is not None or any(stage.keep == "rouge_l" for stage in self.stages)
        learned = any(stage.algorithm.writers - {Source.DATASET} for stage in self.stages)
        return learned or (measured and self.evaluation.prompts > 0)

    def gpus(self) -> float:
        """GPUs the whole run asks for."""
        teachers = self.teachers.replicas * self.teachers.gpus if self.teacher else 0.0
        return self.rollout.replicas * self.rollout.gpus + teachers + self.learner.ranks * self.learner.gpus
