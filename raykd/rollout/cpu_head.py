"""The output head of a bfloat16 model on CPU, whose logits are float32.

vLLM casts the whole matrix to float32 for every token: with V = 50,257 most of the time that a small model needs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from raykd.compiled import compiled, interleave
from raykd.cpu_products import Loop, PackedWeight


class TiledWeight(PackedWeight):
    """In blocks that lie in memory as they are read, of so few rows that the loop over them has to be compiled, by numba: a tenth
    to two fifths quicker for a few states. The learner goes without; numba takes 90 MB."""

    rows = 64

    def _prepared(self, loop: Loop) -> Loop:
        quick = compiled(loop)
        quick(0, 1, 0, self._size, self._width, 0, 0, 0)  # compiled here, for no states
        return quick

    def _lay_out(self, pairs: Tensor) -> None:
        interleave(pairs.numpy().view(np.uint32), self._blocks.numpy().view(np.uint32), 0, 0, len(self._blocks))


class WideHead:
    """In the place of ``LogitsProcessor._apply_head``."""

    def __init__(self) -> None:
        self._weight: TiledWeight | Tensor | None = None
        """In float32 where there is no other way."""
        self._stale = False

    def __call__(self, lm_head: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Logits ``[B, V]``."""
        weight = self._weight
        if weight is None or self._stale:
            weight = self._weight = self._renewed(lm_head.weight)
            self._stale = False
        logits = weight.product(hidden) if isinstance(weight, TiledWeight) else linear(hidden.float(), weight)
        return logits if bias is None else logits.add_(bias)

    def forget(self) -> None:
        """The weights have changed."""
        self._stale = True

    def _renewed(self, weight: Tensor) -> TiledWeight | Tensor:
        if isinstance(self._weight, TiledWeight):
            self._weight.write(weight)
            return self._weight
        try:
            return TiledWeight(weight)
        except NotImplementedError:
            return weight.float()


def widen_head(model: Any, dtype: torch.dtype) -> WideHead | None:
    """Installs one where vLLM would cast bfloat16 matrices."""
    processor = getattr(model, "logits_processor", None)
    if dtype != torch.bfloat16 or processor is None or processor.head_dtype != torch.float32:
        return None
    processor._apply_head = WideHead()
    return processor._apply_head
