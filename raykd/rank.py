"""What a DeepSpeed rank is set up with: its process group and DeepSpeed's configuration."""

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  it is documented there

from raykd.experiment import LearnerConfig

REDUCE_BUCKET = 50_000_000
"""Gradient elements reduced at a time; the buffer is allocated whole."""


def zero_stage(config: LearnerConfig) -> int:
    """The stage DeepSpeed runs. Its stage 0 has neither float32 master weights nor offloading: these run as stage 1."""
    return max(config.zero_stage, 1) if config.dtype == "bfloat16" or config.offload_optimiser else config.zero_stage


class SteadyAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments alone while ``skip`` is true: ZeRO knows the gradient's norm just before its step."""

    def __init__(self, parameters: Iterable[Tensor], skip: Callable[[], bool]) -> None:
        super().__init__(parameters, fused=True)
        self._skip = skip

    def step(self, closure: Any = None) -> Any:
        """Make the step, unless it is to be skipped."""
        return None if self._skip() else super().step(closure)


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation, learning rate and, without ZeRO, clipping are the learner's."""
    stage = zero_stage(config)
    offload = {"offload_optimizer": {"device": "cpu"}} if config.offload_optimiser else {}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0 if stage else 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET, **offload},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def meeting_place(host: str) -> TCPStore:
    """Where ranks find each other, at a ``port`` that it has from now on, for as long as somebody keeps it."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def connect(rank: int, ranks: int, address: tuple[str, int], deadline_s: float) -> torch.device:
    """Join the process group that meets at an address, once in a process; returns this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls what torch has renamed: one warning for every collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    cuda = torch.cuda.is_available()
    local_rank = rank % torch.cuda.device_count() if cuda else 0
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=deadline_s)
        store = TCPStore(*address, is_master=False, timeout=timeout)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
        atexit.register(dist.destroy_process_group)
    return device
