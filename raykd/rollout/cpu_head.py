"""The output head of a bfloat16 model on CPU, whose logits are float32.

vLLM casts the whole matrix to float32 for every token: with V = 50,257 most of the time that a small model needs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from raykd.cpu_products import PackedWeight


class WideHead:
    """In the place of ``LogitsProcessor._apply_head``."""

    def __init__(self) -> None:
        self._weight: PackedWeight | Tensor | None = None
        """In float32 where there is no other way."""
        self._stale = False

    def __call__(self, lm_head: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Logits ``[B, V]``."""
        weight = self._weight
        if weight is None or self._stale:
            weight = self._weight = self._renewed(lm_head.weight)
            self._stale = False
        logits = weight.product(hidden) if isinstance(weight, PackedWeight) else linear(hidden.float(), weight)
        return logits if bias is None else logits.add_(bias)

    def forget(self) -> None:
        """The weights have changed."""
        self._stale = True

    def _renewed(self, weight: Tensor) -> PackedWeight | Tensor:
        if isinstance(self._weight, PackedWeight):
            self._weight.write(weight)
            return self._weight
        try:
            return PackedWeight(weight)
        except NotImplementedError:
            return weight.float()


def widen_head(model: Any, dtype: torch.dtype) -> WideHead | None:
    """Installs one where vLLM would cast bfloat16 matrices."""
    processor = getattr(model, "logits_processor", None)
    if dtype != torch.bfloat16 or processor is None or processor.head_dtype != torch.float32:
        return None
    processor._apply_head = WideHead()
    return processor._apply_head
