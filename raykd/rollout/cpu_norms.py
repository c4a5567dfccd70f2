"""RMS norms on CPU by the kernels that vLLM has compiled for it but keeps to GPUs: one call for eight operations of PyTorch's.

For a small model the operations of a step cost more than their arithmetic. Numbers differ by rounding alone.
"""

import torch
from torch import Tensor
from vllm import ir

PROVIDER = "raykd_cpu"
LANES = 16
"""The kernels take whole vectors."""


def _plain(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    whole = variance_size is None and weight is not None and weight.dtype == x.dtype
    return whole and x.shape[-1] % LANES == 0 and x.is_contiguous()


@ir.ops.rms_norm.register_impl(
    PROVIDER, supports_args=lambda x, weight, epsilon, variance_size=None: _plain(x, weight, variance_size)
)
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight``; [..., H]."""
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


@ir.ops.fused_add_rms_norm.register_impl(
    PROVIDER,
    supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
        _plain(x, weight, variance_size) and x_residual.is_contiguous()
    ),
    inplace=True,
)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of ``x + x_residual``, and the sum, each in place; [..., H]."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
