"""What a vLLM engine needs to know; imports nothing heavy."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """One inference engine, on GPU or CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is the checkpoint's own. The head and the log-probs are float32 whatever this is."""
    max_length: int = Field(default=512, ge=2)
    """Longest prompt and response together."""
    vocab_size: int | None = Field(default=None, ge=2)
    """True vocabulary; rows of the model past it are padding and are never sampled. None: the model has no padding."""
    tensor_parallel: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache."""
    cpu_kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache on machines without a GPU, GiB."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences decoded together; further requests wait their turn."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the engine, where there is no GPU."""
    seed: int = Field(default=0, ge=0)
    deadline: float = Field(default=1800.0, gt=0)
    """Longest wait for one answer, seconds."""
