"""What each kind of worker is told, beside the models."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raykd.value import Positive, Value

Dtype = Literal["float32", "bfloat16"]


class EngineConfig(Value):
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


class _Replicas(Value):
    """Interchangeable workers with vLLM engines."""

    replicas: Positive = 1
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each replica; 0 runs on CPU. Less than 1 shares a GPU, e.g. with a learner rank that asks for the rest of it."""
    engine: EngineConfig = EngineConfig()
    sleep: bool = False
    """The engine that writes gives its GPU memory back from the last response of a phase to the first of the next, so that others
    on its GPU can use it meanwhile: the weights wait in the machine's memory, the KV cache is forgotten."""

    @model_validator(mode="after")
    def _gives_gpu_memory(self) -> Self:
        if self.sleep and not self.gpus:
            raise ValueError("sleep gives GPU memory back, but gpus is 0; set sleep to False, or gpus to a share of a GPU")
        return self

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.gpus and max(self.gpus, 1) < self.engine.tensor_parallel:
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
    """Positions whose distributions exist at the same time, bounded as ``learner.chunk``."""
    payload: Literal["auto", "hidden", "logits"] = "auto"
    """Form in which the teacher's distribution travels: its last hidden state or the logits, both exact. "auto" sends what has
    the fewest bytes, and the top k where a divergence looks at no more."""
    engine: EngineConfig = EngineConfig(memory=0.5)
    """Settings of the engine that writes, which is started where the teacher writes text or tokens of it, and of the engine that
    scores with the back end "vllm", in the scorer's ``dtype``: two engines, each with its own copy of the weights."""
    threads: Positive = 1


class FunctionReward(Value):
    """A Python function ``reward(prompts: list[str], responses: list[str]) -> list[float]``."""

    kind: Literal["function"] = "function"
    name: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    """``package.module:function`` or ``folder/file.py:function``, importable where the workers run."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the rewards of a phase."""


class ClassifierReward(Value):
    """A Hugging Face sequence classifier on prompt and response: the log-probability of one label, or its single logit."""

    kind: Literal["classifier"] = "classifier"
    path: str
    """Folder or Hub name."""
    label: int = Field(default=0, ge=0)
    batch_size: Positive = 16
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the rewards of a phase."""


RewardConfig = Annotated[FunctionReward | ClassifierReward, Field(discriminator="kind")]


class LoRA(Value):
    """Low-rank adaptation (arXiv 2106.09685): of a layer's weight W + (alpha / rank) B A, only A and B are learned."""

    rank: int = Field(default=0, ge=0)
    """Rank of the update of each adapted layer, e.g. 16; 0: all weights are learned, without adapters."""
    alpha: float = Field(default=64.0, gt=0)
    """The update is scaled by alpha / rank; 64 is the value of DistiLLM's public code for rank 16."""
    targets: tuple[str, ...] = ()
    """Linear layers to adapt, by the last part of their names, e.g. q_proj and v_proj; none named: all but the head, as
    QLoRA found necessary (arXiv 2305.14314, section 4)."""

    @property
    def adapters(self) -> dict[str, Any] | None:
        """What must be equal where a checkpoint is written and where it is read; without adapters nothing."""
        return self.model_dump(mode="json") if self.rank else None


class LearnerConfig(Value):
    """DeepSpeed ranks."""

    ranks: Positive = 1
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each rank; 0 runs on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Dtype = "bfloat16"
    micro_batch: Positive = 8
    """Sequences of one forward and backward pass on one rank."""
    chunk: Positive = 1024
    """Positions whose distributions exist at the same time, at most: a chunk never has more than 8 million logits (on a GPU that
    or 256 positions), which is less than the default from 8,192 ids on. Fewer where memory is short: at V = 50,257 on a CPU 64
    take 40 MB less than its 156, and 6 % longer."""
    compiled: bool | None = None
    """What is computed over the vocabulary is compiled by torch.compile, 10 s for each algorithm; takes a C++ compiler. None: on
    GPUs."""
    lora: LoRA = LoRA()
    activation_checkpointing: bool = False
    offload_optimiser: bool = False
    threads: Positive = 1
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait of one rank for another."""

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.ranks > 1 and 0 < self.gpus <= 0.5:
            raise ValueError(
                f"two of {self.ranks} ranks with gpus {self.gpus:g} could be given the same GPU, where NCCL does not connect "
                "them; set gpus above 0.5"
            )
        return self
