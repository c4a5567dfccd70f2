"""Hidden states times an output head -> a weighted loss over the vocabulary, a chunk of positions at a time: never ``[N, V]``.

Shapes: N positions, n positions of a chunk, H hidden width, V true vocabulary (heads may be padded beyond it).

    student hidden -> W h [n, V] -> log-softmax --+
    teacher hidden -> W h [n, V] -> log-softmax --+-> reduce -> {name: [n]}, the loss among them -> weighted sum
                                                                                                        |
    gradients of hidden states, weight, bias <- two products <- slope: d sum / d (W h) [n, V] <- autograd

Weights are known beforehand and no position's loss depends on another's, so that a chunk is differentiated as soon as it exists
and then forgotten: four matrix products, none of them twice. Liger-Kernel's fused losses (arXiv 2410.10989) do so, too. Between
the products a chunk is taken in tiles, in which autograd differentiates whatever ``reduce`` does. On a CPU a tile's slope takes
the place of its W h. On a GPU the slopes of a few chunks, in the dtype of the head, are kept and multiplied together: each
product passes over the whole gradient of the head. Memory: W h of a chunk for both models, a few tiles, those slopes, and the
gradients themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raykd.logprobs import can_look, gather, promote
from raykd.payloads import Probe, Top, compare, unwritten

Reduce = Callable[[Tensor, Tensor | None, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""Student and teacher log-probs ``[n, V]``, tokens ``[n]`` and what is given of them ``{name: [n]}``, to ``{name: [n]}``: an
algorithm's ``per_token``."""

CHUNK_ELEMENTS = {"cpu": 15 * 2**19, "cuda": 2**24}
"""Most logits of a chunk. On a CPU 30 MiB, 156 positions at V = 50,257: what is larger than 32 MiB the C library gives back to
the system at once, and getting it again page by page takes longer than computing on it."""
CHUNK_POSITIONS = {"cpu": 1, "cuda": 256}
"""But at least so many positions, in multiples of as many: with fewer, a GPU reads the head for longer than it multiplies."""
CHUNKS = {"cpu": 1, "cuda": 4}
"""Whose slopes are multiplied together."""
TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**62}
"""Most logits that are reduced at a time: on a CPU 4 MiB, so that the many passes between logits and slope stay in its cache."""

PROGRAMS = 64
"""Compiled ones that are kept: an algorithm has several, with and without gradient, for the first tile of a chunk and others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (W h + b) / softcap), float32 (float64 for float64 weights)."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None
    widened: bool = False
    """The weight is float32 that holds bfloat16 values."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, H] -> [n, V]``."""
        return self.logits(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """W h, ``[n, H] -> [n, V]``. That of halves is kept in float32: a bfloat16 logit near 16 would be off by up to 0.06."""
        with halves(self.widened):
            return _product(hidden.to(self.weight.dtype), self.weight.T)

    def logits(self, product: Tensor) -> Tensor:
        """Bias, scale and soft-cap; ``[n, V] -> [n, V]``, the same tensor where there are none."""
        logits = product if self.bias is None else product + self.bias.to(product.dtype)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cut(self, vocab_size: int) -> "Head":
        """The head of the true vocabulary: the first ``vocab_size`` rows, without a copy."""
        if vocab_size > len(self.weight):
            raise ValueError(
                f"the head has {len(self.weight)} rows but the tokenizer {vocab_size} tokens: it is another model's head"
            )
        return replace(self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size])

    def to(self, device: torch.device) -> "Head":
        """The same on another device."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def ready(self, vocab_size: int) -> "Head":
        """Cut to the true vocabulary; on a CPU, where products of halves would be rounded to halves, widened. A frozen model's is
        made ready once: for a small one, widening takes a tenth of a step."""
        head = self.cut(vocab_size)
        if head.weight.is_cuda:
            return head
        widened = head.widened or head.weight.dtype == torch.bfloat16
        return replace(head, weight=promote(head.weight), widened=widened)


def weighted_loss(
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    weights: Tensor,
    reduce: Reduce,
    *,
    vocab_size: int,
    given: dict[str, Tensor] | None = None,
    teacher_states: Tensor | Top | None = None,
    teacher_head: Head | None = None,
    probe: Probe | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n weights_n loss_n of ``reduce``, and the sums of its other entries, which have no gradient.

    ``hidden`` is ``[N, H]``, ``tokens`` and ``weights`` are ``[N]``; the loss is differentiable once, to ``hidden`` and to weight
    and bias of ``head``. The teacher comes as its hidden states ``[N, H]`` with ``teacher_head``, as its logits ``[N, V]`` or
    most probable tokens without, or not at all. With ``probe`` it is compared on the way: ValueError when it is not the teacher's
    own distribution. A chunk is ``chunk`` positions at most. ``compiled``: what lies between the products is, by torch.compile.
    """
    gradients = _Gradients.of(hidden, head, vocab_size)
    totals: dict[str, Tensor] = {}
    rebuilt = unwritten(tokens)
    size, chunks = _positions(hidden, vocab_size, chunk), CHUNKS[hidden.device.type]

    def differentiate(rows: slice, states: Tensor, slope: Tensor | None) -> Tensor:
        """A chunk's W h; its slope is written to ``slope``, or over it. A function, as ``take``: what it holds ends with it."""
        product = student.product(states)
        teacher_product = None if teacher_states is None else _product_of(teacher_states, rows, guide, vocab_size)
        for at in _slices(rows.start, rows.stop, max(1, TILE_ELEMENTS[hidden.device.type] // vocab_size)):
            tile = slice(at.start - rows.start, at.stop - rows.start)
            sums = partial(
                _compiled() if compiled else _sums,
                teacher=None if teacher_product is None else teacher_product[tile],
                tokens=tokens[at].clone(),  # so that none begins inside another: compiled programs look at that
                weights=weights[at].clone(),
                given={name: values[at].clone() for name, values in (given or {}).items()},
                probe=rebuilt.rows(at),
                reduce=reduce,
                heads=(student, guide),
                vocab_size=vocab_size,
            )
            into = None if not gradients.wanted else product[tile] if slope is None else slope[tile]
            for name, value in _differentiate(product[tile], sums, into).items():
                totals[name] = totals.get(name, 0.0) + value
        return product

    def take(block: slice) -> None:
        states = hidden[block].to(student.weight.dtype)
        if chunks == 1:
            slope = differentiate(block, states, None)
        else:
            slope = states.new_empty(len(states) if gradients.wanted else 0, vocab_size)
            for rows in _slices(block.start, block.stop, size):
                own = slice(rows.start - block.start, rows.stop - block.start)
                differentiate(rows, states[own], slope[own])
        if gradients.wanted:
            with halves(student.widened):
                gradients.add(block, slope, states, student.weight)

    with torch.no_grad():
        student = head.ready(vocab_size)
        guide = None if teacher_head is None else teacher_head.ready(vocab_size)
        for block in _slices(0, len(tokens), size * chunks):
            take(block)
    if probe is not None and teacher_states is not None:
        compare(probe, rebuilt, torch.float32 if isinstance(teacher_states, Top) else teacher_states.dtype)
    return _Differentiated.apply(totals.pop("loss"), gradients, hidden, head.weight, head.bias), totals


@contextmanager
def halves(wanted: bool) -> Iterator[None]:
    """On a CPU, float32 matrices are multiplied from their values in bfloat16 and summed in float32: exact where they hold no
    others, two to three times as fast where the CPU multiplies bfloat16, as before elsewhere. On CUDA ``mm`` has an argument."""
    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = products.fp32_precision
    products.fp32_precision = "bf16" if wanted else before
    try:
        yield
    finally:
        products.fp32_precision = before


@torch.no_grad()
def teacher_probe(states: Tensor, head: Head | None, tokens: Tensor, vocab_size: int, chunk: int | None = None) -> Probe:
    """What ``Scores`` carries as its probe, from the teacher's hidden states ``[N, H]``, or from logits when ``head`` is None."""
    head = None if head is None else head.ready(vocab_size)
    probe = unwritten(tokens)
    for rows in _slices(0, len(tokens), _positions(states, vocab_size, chunk)):
        _teacher(_product_of(states, rows, head, vocab_size), head, tokens[rows], vocab_size, probe.rows(rows))
    return probe


@torch.no_grad()
def teacher_top(states: Tensor, head: Head, k: int, vocab_size: int, chunk: int | None = None) -> Top:
    """The ``k`` most probable tokens, from the teacher's hidden states ``[N, H]``."""
    head = head.ready(vocab_size)
    found = []
    for rows in _slices(0, len(states), _positions(states, vocab_size, chunk)):
        logprobs = torch.log_softmax(head(states[rows]), dim=-1)
        values, tokens = logprobs.topk(k)
        others = logprobs.scatter_(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
        found.append(Top(tokens.int(), torch.cat([values, others], -1).float()))
    return Top(torch.cat([top.tokens for top in found]), torch.cat([top.logprobs for top in found]))


def _sums(
    product: Tensor,
    *,
    teacher: Tensor | None,
    tokens: Tensor,
    weights: Tensor,
    given: dict[str, Tensor],
    probe: Probe,
    reduce: Reduce,
    heads: tuple[Head, Head | None],
    vocab_size: int,
) -> dict[str, Tensor]:
    """Of a tile, everything between the products: what it adds to every total, and in ``probe`` what it shows of the teacher."""
    student, guide = heads
    logprobs = None if teacher is None else _teacher(teacher, guide, tokens, vocab_size, probe)
    values = reduce(torch.log_softmax(student.logits(product), dim=-1), logprobs, tokens, given)
    values["loss"] = values["loss"] * weights.to(product.dtype)
    return {name: value.sum() for name, value in values.items()}


@cache
def _compiled() -> Callable[..., dict[str, Tensor]]:
    """A program for each algorithm, for tiles of any height; few, so that all are kept."""
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    return torch.compile(_sums, dynamic=True)


def _differentiate(product: Tensor, sums: Callable[[Tensor], dict[str, Tensor]], into: Tensor | None) -> dict[str, Tensor]:
    """The sums of a tile; d loss / d (W h) is written to ``into``, where that is wanted."""
    with torch.set_grad_enabled(into is not None):
        found = sums(product.requires_grad_(into is not None))
    if into is not None:
        into.copy_(torch.autograd.grad(found["loss"], product)[0])
    return {name: value.detach() for name, value in found.items()}


class _Gradients(NamedTuple):
    """Of what is learned, in at least float32; None of what is not."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: Head, vocab_size: int) -> "_Gradients":
        """To be filled: all but the bias's, and the rows that the head has beyond the vocabulary."""
        gradients = cls(*(_unwritten_if_learned(value) for value in (hidden, head.weight, head.bias)))
        if gradients.weight is not None:
            gradients.weight[vocab_size:] = 0
        if gradients.bias is not None:
            gradients.bias.zero_()
        return gradients

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in self)

    def add(self, rows: slice, slope: Tensor, states: Tensor, weight: Tensor) -> None:
        """Those of some rows, in order: ``slope`` is d loss / d (W h), ``[n, V]``."""
        vocab_size, beta = slope.shape[1], 0 if rows.start == 0 else 1
        if self.hidden is not None:
            _add_product(self.hidden[rows], 0, slope, weight)
        if self.weight is not None:
            _add_product(self.weight[:vocab_size], beta, slope.T, states)
        if self.bias is not None:
            self.bias[:vocab_size] += slope.sum(0, dtype=self.bias.dtype)


class _Differentiated(torch.autograd.Function):
    """The loss, whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: _Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Autograd casts each to its input's dtype, so that half-precision gradients are rounded once.
        if can_look(upstream[0]) and bool(upstream[0] == 1):  # a copy of the head's gradient takes a twentieth of a step
            return None, None, *ctx.saved_tensors
        return None, None, *(None if gradient is None else gradient * upstream[0] for gradient in ctx.saved_tensors)


def _unwritten_if_learned(value: Tensor | None) -> Tensor | None:
    if value is None or not (value.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.empty_like(value, dtype=torch.promote_types(value.dtype, torch.float32))


def _product_of(sent: Tensor | Top, rows: slice, head: Head | None, vocab_size: int) -> Tensor:
    """The teacher's W h of some rows, or its logits where they are what was sent."""
    if isinstance(sent, Top):
        return sent.rows(rows).spread(vocab_size)
    return sent[rows] if head is None else head.product(sent[rows])


def _teacher(product: Tensor, head: Head | None, tokens: Tensor, vocab_size: int, probe: Probe) -> Tensor:
    """The teacher's log-probs ``[n, V]``; the probe that they give is written down."""
    if product.shape[1] < vocab_size:
        raise ValueError(
            f"{product.shape[1]} logits for a vocabulary of {vocab_size}: model and tokenizer do not belong together"
        )
    logits = promote(product[:, :vocab_size]) if head is None else head.logits(product)
    logprobs = torch.log_softmax(logits, dim=-1)
    probe.logprobs.copy_(gather(logprobs, tokens))
    probe.log_normaliser.copy_(gather(logits, tokens) - probe.logprobs)
    return logprobs


def _product(first: Tensor, second: Tensor) -> Tensor:
    """first @ second, in at least float32."""
    if first.is_cuda and first.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(first, second, out_dtype=torch.float32)
    return promote(first) @ promote(second)


def _add_product(total: Tensor, beta: int, first: Tensor, second: Tensor) -> None:
    """total = beta total + first @ second, without a temporary where that can be."""
    if first.dtype == total.dtype:
        total.addmm_(first, second, beta=beta)
    elif first.is_cuda:
        torch.addmm(total, first, second, beta=beta, out_dtype=total.dtype, out=total)
    else:
        product = _product(first, second)
        total.copy_(product if beta == 0 else total + product)


def _positions(states: Tensor, vocab_size: int, most: int | None = None) -> int:
    """Of a chunk."""
    device = states.device.type
    step = CHUNK_POSITIONS[device]
    positions = max(step, CHUNK_ELEMENTS[device] // vocab_size // step * step)
    return positions if most is None else min(positions, most)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """At most ``size`` positions each; an empty one where there are none, so that every name gets its sum."""
    for first in range(start, max(stop, start + 1), size):
        yield slice(first, min(first + size, stop))
