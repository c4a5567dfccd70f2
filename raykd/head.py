"""A language model's output head, and products with it that are as exact as float32.

Shapes: n positions, H hidden width, V true vocabulary (heads may be padded beyond it).
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from raykd.cpu_products import PackedWeight, add_outer, product_by_blocks
from raykd.logprobs import promote

COLUMNS = {"cpu": 1, "cuda": 64}
"""Rows of W h begin at multiples of so many numbers, and so many are computed at least: on a GPU products of odd sizes take seven
times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (W h + b) / softcap), float32 (float64 for float64 weights)."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None
    packed: PackedWeight | None = None
    """The weight as a CPU multiplies bfloat16 by it."""
    tail: Tensor | None = None
    """On a GPU, where V is no multiple of ``COLUMNS``: the last rows of the weight, and zeros up to that multiple."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, H] -> [n, V]``."""
        return self.logits(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """W h, in float32 for half-precision inputs: a bfloat16 logit near 16 would be off by up to 0.06."""
        hidden = hidden.to(self.weight.dtype)
        if self.packed is not None:
            return self.packed.product(hidden)
        if hidden.is_cpu:
            return product_by_blocks(promote(hidden), promote(self.weight))
        if self.tail is None:
            return _product(hidden, self.weight.T)
        size, whole = len(self.weight), self._whole
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        product = hidden.new_empty(len(hidden), whole + len(self.tail), dtype=dtype)
        _product(hidden, self.weight[:whole].T, product[:, :whole])
        _product(hidden, self.tail.T, product[:, whole:])
        return product[:, :size]

    def pull_back(self, slope: Tensor, out: Tensor) -> None:
        """slope W, ``[n, V] -> [n, H]``: the gradient of ``hidden`` from that of its product."""
        if self.tail is not None:  # the small part first, so that what is rounded last is the sum
            whole = self._whole
            add_product(out, 0, slope[:, whole:], self.weight[whole:])
            add_product(out, 1, slope[:, :whole], self.weight[:whole])
        elif slope.is_cpu:  # half precision is rounded here as it would be by autograd
            out.copy_(slope @ self.weight)
        else:
            add_product(out, 0, slope, self.weight)

    @property
    def _whole(self) -> int:
        """Rows before those of the tail."""
        return len(self.weight) - (0 if self.tail is None else len(self.weight) % len(self.tail))

    def logits(self, product: Tensor) -> Tensor:
        """Bias, scale and soft-cap; ``[n, V]``, the product's own memory where there are none."""
        logits = product if self.bias is None else product + self.bias.to(product.dtype)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cut(self, vocab_size: int) -> "Head":
        """The head of the true vocabulary: the first ``vocab_size`` rows, without a copy."""
        if vocab_size > len(self.weight):
            raise ValueError(
                f"the head has {len(self.weight)} rows but the tokenizer {vocab_size} tokens: it is another model's head"
            )
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias, packed=None, tail=None)

    def to(self, device: torch.device) -> "Head":
        """A copy on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, packed=None, tail=None)

    def frozen(self) -> "Head":
        """To multiply by and not to differentiate: without the weight where it is packed, of which only shape and dtype stay."""
        return self if self.packed is None else replace(self, weight=self.weight.to("meta"))

    def ready(self, vocab_size: int) -> "Head":
        """Cut to the true vocabulary and laid out for fast products. A CPU would round those of half-precision numbers to half
        precision: such a weight is packed, or else widened. A frozen model's head is made ready once."""
        if self.packed is not None and len(self.weight) == vocab_size:
            return self
        head = self.cut(vocab_size)
        with suppress(NotImplementedError):
            return replace(head, packed=PackedWeight(head.weight))
        weight = promote(head.weight) if head.weight.is_cpu else head.weight
        columns = COLUMNS[weight.device.type]
        rest = vocab_size % columns
        return replace(head, weight=weight, tail=pad(weight[-rest:], (0, 0, 0, columns - rest)) if rest else None)


def _product(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """first @ second on a GPU, in at least float32."""
    if first.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(first, second, out_dtype=torch.float32, out=out)
    return torch.mm(first, second, out=out)


def add_product(total: Tensor, beta: int, first: Tensor, second: Tensor) -> None:
    """total = beta total + first @ second, without a temporary; beta is 0 or 1."""
    if first.dtype == total.dtype:
        total.addmm_(first, second, beta=beta)
    elif first.is_cuda:
        torch.addmm(total, first, second, beta=beta, out_dtype=total.dtype, out=total)
    else:  # half precision on a CPU
        add_outer(total, first.T, second, beta=beta)
