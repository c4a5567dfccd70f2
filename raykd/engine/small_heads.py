"""vLLM's CPU attention for the narrow heads of very small models, exact: heads are padded with zeros to a width its kernel has.

Zeros appended to q and k leave every score q.k as it was (the softmax scale belongs to the layer, not to the width),
zeros appended to v give output columns that are cut away. Heads of a supported width pass through untouched.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

import raykd.engine.cpu_corrections  # noqa: F401  (every worker on a CPU imports this module)


@cache
def kernel_width(head_size: int) -> int:
    """The smallest head width the CPU kernel has that is at least ``head_size``."""
    widths = [width for width in CPUAttentionBackend.get_supported_head_sizes() if width >= head_size]
    if not widths:
        raise ValueError(f"attention heads are {head_size} wide, vLLM on CPU has kernels up to 512; use a GPU for this model")
    return min(widths)


class SmallHeadImpl(CPUAttentionBackendImpl):
    """CPU attention over a KV cache whose heads are padded to the kernel's width."""

    def _widen(self, heads: Tensor) -> Tensor:
        missing = kernel_width(self.head_size) - self.head_size
        return pad(heads, (0, missing)) if missing else heads

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend with widened heads; ``output`` has the model's width."""
        if attn_metadata is None or kernel_width(self.head_size) == self.head_size:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        wide = torch.empty_like(self._widen(output))
        super().forward(layer, self._widen(query), self._widen(key), self._widen(value), kv_cache, attn_metadata, wide)
        return output.copy_(wide[..., : self.head_size])

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write widened keys and values into the cache."""
        super().do_kv_cache_update(layer, self._widen(key), self._widen(value), kv_cache, slot_mapping)


@register_backend(AttentionBackendEnum.CPU_ATTN)
class SmallHeadBackend(CPUAttentionBackend):
    """vLLM's CPU attention back end, any head width up to its largest."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Ask for a cache of the kernel's width."""
        width = kernel_width(spec.head_size)
        return replace(spec, head_size=width, head_size_v=width)

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The implementation that widens."""
        return SmallHeadImpl


class WorkerExtension:
    """Named in an engine's arguments so that every worker process imports this module."""
