"""Two things that vLLM's CPU build computes otherwise than its GPU build and transformers do, put right in every process that
imports this, before a model is made.

DeepSeek, GLM-4.7-Flash and LFM2 rotate heads that lie apart, ``[tokens, heads, width]``, which the CPU's kernel takes for one
row, ``[tokens, heads * width]``: it turns wrong places. A router with a bias that decides which experts are chosen
(Ernie 4.5) loses it where experts are in no groups: one group of all experts is the same, and keeps it.
"""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

_rotate_rows = RotaryEmbedding.forward_cpu
_choose = CPURouter._compute_routing


def rotate(self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The rotated query and key: by vLLM's kernel where heads lie in a row, else by its PyTorch code."""
    if query.dim() == 3:
        return self.forward_native(positions, query, key)
    return _rotate_rows(self, positions, query, key)


def choose_experts(self: CPURouter, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Weights and ids of the chosen experts, by scores and bias."""
    if self.e_score_correction_bias is not None and not self.use_grouped_topk and self.scoring_func in ("softmax", "sigmoid"):
        self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
    return _choose(self, *arguments, **options)


RotaryEmbedding.forward_cpu = rotate
CPURouter._compute_routing = choose_experts
