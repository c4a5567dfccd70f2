"""The output head of a bfloat16 model on CPU, whose logits are float32.

vLLM casts the whole matrix to float32 for every token: with V = 50,257 most of the time that a small model needs. Here it is cast
once for each version of the weights, and multiplied from bfloat16 where the CPU does that, which is exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from raykd.projection import halves


class WideHead:
    """In the place of ``LogitsProcessor._apply_head``."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def __call__(self, lm_head: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Logits ``[B, V]``."""
        weight = self._weight = lm_head.weight.float() if self._weight is None else self._weight
        with halves(True):
            return linear(hidden.float(), weight, None if bias is None else bias.float())

    def forget(self) -> None:
        """The weights have changed."""
        self._weight = None


def widen_head(model: Any, dtype: torch.dtype) -> WideHead | None:
    """Installs one where vLLM would cast bfloat16 matrices."""
    processor = getattr(model, "logits_processor", None)
    if dtype != torch.bfloat16 or processor is None or processor.head_dtype != torch.float32:
        return None
    processor._apply_head = WideHead()
    return processor._apply_head
