"""Starting vLLM, for those that write and those that score: its environment, and what is different without a GPU."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from transformers import AutoConfig

from raykd.experiment import EngineConfig

if TYPE_CHECKING:
    from vllm import LLMEngine

# vLLM on CPU replaces torch.set_num_threads by a function that does nothing; this is the real one.
_set_num_threads = torch.set_num_threads

# vLLM keeps the context of a forward pass in a module global: two engines of one process must not step at once.
STEPPING = threading.Lock()

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the KV cache on CPU: the smallest its kernels take, so that most of a prefix is found cached."""

TURN_DEADLINE_S = 900.0


def prepare() -> None:
    """Set the environment that vLLM reads when it is imported; what the caller has set stays."""
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler runs in our thread


@contextmanager
def turn_on_gpu() -> Iterator[None]:
    """Processes that have a part of the same GPU start one after another. vLLM takes what it finds free for its KV cache, and
    refuses to start where others give memory back meanwhile. Within a process it may be nested. Raises RuntimeError after
    fifteen minutes."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not gpu or "," in gpu:  # none, or whole ones
        yield
        return
    try:
        with _turns(gpu):
            yield
    except Timeout:
        raise RuntimeError(
            f"GPU {gpu} is shared, and another process has been starting on it for {TURN_DEADLINE_S:g} s; look at the other "
            "actors' logs"
        ) from None


@cache
def _turns(gpu: str) -> FileLock:
    path = Path(gettempdir()) / f"raykd-{os.getuid()}-gpu-{gpu}.lock"
    return FileLock(path, timeout=TURN_DEADLINE_S, thread_local=False)


def start(model: str, config: EngineConfig, arguments: dict[str, Any]) -> "LLMEngine":
    """Start vLLM in the calling thread with these arguments of its own; tensor-parallel workers get processes of their own."""
    prepare()
    arguments = arguments | {"hf_overrides": arguments["hf_overrides"] | as_transformers_computes(model)}
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    on_cpu: dict[str, Any] = {}
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas share the cores as the scheduler sees fit
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))  # for tensor-parallel workers
        _set_num_threads(config.threads)
        kv_cache_bytes = int(config.cpu_cache_gib * 2**30)
        on_cpu = {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE, "kv_cache_memory_bytes": kv_cache_bytes}
    shared = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        dtype=config.dtype,
        max_num_seqs=config.max_sequences,
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        gpu_memory_utilization=config.memory,
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **on_cpu,
        **arguments,
    )
    with turn_on_gpu():
        return LLMEngine.from_engine_args(shared)


def as_transformers_computes(model: str) -> dict[str, Any]:
    """Fields of a model's configuration by which vLLM computes what transformers does: it widens Cohere 2's windows by a
    position, as it says they were in training."""
    config = AutoConfig.from_pretrained(model)
    widened = config.model_type in ("cohere2", "cohere2_moe") and config.sliding_window
    return {"sliding_window": config.sliding_window - 1} if widened else {}
