"""Hidden states times an output head -> a weighted loss over the vocabulary, a chunk of positions at a time: never ``[N, V]``.

Shapes: N positions, n positions of a chunk, H hidden width, V true vocabulary (heads may be padded beyond it).

    student hidden -> W h [n, V] -> log-softmax --+
    teacher hidden -> W h [n, V] -> log-softmax --+-> reduce -> {name: [n]}, the loss among them -> weighted sum
                                                                                                        |
    gradients of hidden states, weight, bias <- two products <- slope: d sum / d (W h) [n, V] <- autograd

Weights are known beforehand and no position's loss depends on another's, so that a chunk is differentiated as soon as it exists
and then forgotten: four matrix products, none of them twice. Liger-Kernel's fused losses (arXiv 2410.10989) do so, too. Between
the products a chunk is taken in tiles, in which autograd differentiates whatever ``reduce`` does. Slopes have the dtype of the
head. On a CPU a tile's takes the place of its W h; on a GPU those of a few chunks are multiplied together. Memory: W h of a chunk
for both models, a few tiles or slopes, and the gradients themselves, which are sums over chunks and rounded once: in float32, on
a GPU in three bytes a number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from raykd.gpu_products import Sum, scale_
from raykd.head import COLUMNS, Head, add_product
from raykd.logprobs import can_look, gather, promote
from raykd.payloads import Probe, Top, compare, unwritten

Reduce = Callable[[Tensor, Tensor | None, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""Student and teacher log-probs ``[n, V]``, tokens ``[n]`` and what is given of them ``{name: [n]}``, to ``{name: [n]}``: an
algorithm's ``per_token``."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is computed at a time."""

    chunk: int
    """Most logits of a chunk."""
    positions: int
    """A chunk has at least so many, and a multiple of them."""
    tile: int
    """Most logits that are reduced at a time."""
    together: int
    """Chunks whose slopes are multiplied together; 0: each, in the place of its W h."""


SIZES = {
    # Chunks of 30 MiB, 156 positions at V = 50,257: what is larger than 32 MiB the C library gives back to the system at once,
    # and getting it again page by page takes longer than computing on it. Tiles of 3 MiB: the many passes between logits and
    # slope stay in the caches.
    "cpu": Sizes(chunk=15 * 2**19, positions=1, tile=3 * 2**18, together=0),
    # Of bfloat16, a twentieth of the memory of all at once. With fewer positions the heads are read for longer than they are
    # multiplied, and so are the sums of gradients with fewer of them together.
    "cuda": Sizes(chunk=2**23, positions=256, tile=2**62, together=3),
}

RECOMPUTE: dict[str, Any] = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200, "split_reductions": False}
"""To torch.compile on a GPU: log-probs are computed from W h wherever they are looked at, rather than written and read again, and
a row by one block of threads, since there are enough rows."""
PROGRAMS = 64
"""Compiled ones that are kept: an algorithm has several, with and without gradient, for the first tile of a chunk and others."""


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
    with torch.no_grad():
        student = head.ready(vocab_size)
        guide = None if teacher_head is None else teacher_head.ready(vocab_size)
    sizes, size = SIZES[hidden.device.type], _positions(hidden, vocab_size, chunk)
    together = size * max(1, sizes.together)
    gradients = _Gradients.of(hidden, head, vocab_size, summed=len(tokens) > together or student.tail is not None)
    totals: dict[str, Tensor] = {}
    rebuilt = unwritten(tokens)

    def differentiate(rows: slice, states: Tensor, slope: Tensor | None) -> Tensor:
        """A chunk's slope, written to ``slope``, or over its W h. A function, as ``take``: what it holds ends with it."""
        product = student.product(states)
        if slope is None:
            slope = product.view(student.weight.dtype)[:, :vocab_size]  # in half precision the first half of each row
        teacher_product = None if teacher_states is None else _product_of(teacher_states, rows, guide, vocab_size)
        for at in _slices(rows.start, rows.stop, max(1, sizes.tile // vocab_size)):
            tile = slice(at.start - rows.start, at.stop - rows.start)
            found, known = _differentiate(
                product[tile],
                slope[tile],
                gradients.wanted,
                compiled,
                None if teacher_product is None else teacher_product[tile],
                tokens[at].clone(),  # so that none begins inside another: compiled programs look at that
                weights[at].clone(),
                {name: values[at].clone() for name, values in (given or {}).items()},
                reduce,
                (student, guide),
                vocab_size,
            )
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value
            if known:
                rebuilt.write(at, *known)
        return slope

    def take(block: slice) -> None:
        states = hidden[block].to(student.weight.dtype)
        if not sizes.together:
            slope = differentiate(block, states, None)
        else:
            columns = vocab_size + -vocab_size % COLUMNS[hidden.device.type]
            slope = states.new_empty(len(states) if gradients.wanted else 0, columns)[:, :vocab_size]
            for rows in _slices(block.start, block.stop, size):
                own = slice(rows.start - block.start, rows.stop - block.start)
                differentiate(rows, states[own], slope[own])
        if gradients.wanted:
            gradients.add(block, slope, states, student, ends=block.stop == len(tokens))

    with torch.no_grad():
        for block in _slices(0, len(tokens), together):
            take(block)
    if probe is not None and teacher_states is not None:
        compare(probe, rebuilt, torch.float32 if isinstance(teacher_states, Top) else teacher_states.dtype)
    return _Differentiated.apply(totals.pop("loss"), gradients.all, hidden, head.weight, head.bias), totals


@torch.no_grad()
def teacher_probe(states: Tensor, head: Head | None, tokens: Tensor, vocab_size: int, chunk: int | None = None) -> Probe:
    """What ``Scores`` carries as its probe, from the teacher's hidden states ``[N, H]``, or from logits when ``head`` is None."""
    head = None if head is None else head.ready(vocab_size)
    probe = unwritten(tokens)
    for rows in _slices(0, len(tokens), _positions(states, vocab_size, chunk)):
        probe.write(rows, *_teacher(_product_of(states, rows, head, vocab_size), head, tokens[rows], vocab_size)[1])
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


Found = tuple[dict[str, Tensor], tuple[Tensor, ...]]
"""What a tile adds to every total, and what it shows of the teacher: a ``Probe``, or nothing."""


def _sums(
    product: Tensor,
    teacher: Tensor | None,
    tokens: Tensor,
    weights: Tensor,
    given: dict[str, Tensor],
    reduce: Reduce,
    heads: tuple[Head, Head | None],
    vocab_size: int,
) -> tuple[Tensor, Found]:
    """Everything of a tile that lies between the matrix products: the loss, and what else is found."""
    student, guide = heads
    logprobs, known = (None, ()) if teacher is None else _teacher(teacher, guide, tokens, vocab_size)
    values = reduce(torch.log_softmax(student.logits(product), dim=-1), logprobs, tokens, given)
    loss = (values["loss"] * weights.to(product.dtype)).sum()
    return loss, ({name: value.detach().sum() for name, value in values.items()} | {"loss": loss.detach()}, known)


def _differentiate(product: Tensor, slope: Tensor, wanted: bool, compiled: bool, *tile: Any) -> Found:
    """What is found in a tile. If ``wanted``, d loss / d (W h) is written to ``slope``, on a CPU the memory of W h itself."""
    kind = product.device.type
    if not wanted:
        return (_compiled(_sums, kind) if compiled else _sums)(product, *tile)[1]
    if compiled and product.is_cuda:
        return _compiled(_write_gradient, kind)(product, slope, *tile)
    if compiled:
        gradient, found = _compiled(_gradient_and_sums, kind)(product, slope.dtype, *tile)
    else:
        with torch.enable_grad():
            loss, found = _sums(product.requires_grad_(), *tile)
        (gradient,) = torch.autograd.grad(loss, product)
    slope.copy_(gradient)
    return found


def _gradient_and_sums(product: Tensor, dtype: torch.dtype, *tile: Any) -> tuple[Tensor, Found]:
    """The gradient and the sums of a tile, a function of tensors only: torch.compile makes one program of it."""
    gradient, found = torch.func.grad(_sums, has_aux=True)(product, *tile)
    return gradient.to(dtype), found


def _write_gradient(product: Tensor, slope: Tensor, *tile: Any) -> Found:
    """The same, but the gradient is rounded and written to ``slope``, which is no part of ``product``."""
    gradient, found = _gradient_and_sums(product, slope.dtype, *tile)
    slope.copy_(gradient)
    return found


@cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A program for each algorithm, for tiles of any height; few, so that all are kept."""
    torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
    if device == "cpu":
        return torch.compile(function, dynamic=True)
    program = torch.compile(function, dynamic=False, options=RECOMPUTE)

    def of_any_height(*arguments: Any) -> Any:
        for value in tree_leaves(arguments):
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return program(*arguments)

    return of_any_height


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Gradients of what is learned; None for what is not."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_sum: Sum | None = None
    """Adds products up into ``weight``."""

    @classmethod
    def of(cls, hidden: Tensor, head: Head, vocab_size: int, *, summed: bool) -> "_Gradients":
        """Uninitialised memory, but zeros for the bias and the rows beyond the vocabulary. ``summed``: sums over several chunks.
        At least float32, so that sums are rounded once; their own dtype where a GPU's products do that by themselves."""

        def room(value: Tensor | None, *, wide: bool) -> Tensor | None:
            if value is None or not (value.requires_grad and torch.is_grad_enabled()):
                return None
            dtype = torch.promote_types(value.dtype, torch.float32) if wide or value.is_cpu else value.dtype
            return torch.empty_like(value, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)

        weight, weight_sum = room(head.weight, wide=False), None
        if weight is not None and summed:
            try:
                weight_sum = Sum(weight[:vocab_size])
            except NotImplementedError:
                weight = room(head.weight, wide=True)
        bias = room(head.bias, wide=True)
        if weight is not None:
            weight[vocab_size:] = 0
        if bias is not None:
            bias.zero_()
        return cls(room(hidden, wide=hidden.dtype != head.weight.dtype), weight, bias, weight_sum)

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """In the order of the inputs."""
        return self.hidden, self.weight, self.bias

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in self.all)

    def add(self, rows: slice, slope: Tensor, states: Tensor, head: Head, *, ends: bool) -> None:
        """Add the gradients of some positions, in order: ``slope`` is d loss / d (W h), ``[n, V]``."""
        begins = rows.start == 0
        if self.hidden is not None:
            head.pull_back(slope, self.hidden[rows])
        if self.weight_sum is not None:
            self.weight_sum.add(slope, states, begins=begins, ends=ends)
        elif self.weight is not None:
            add_product(self.weight[: slope.shape[1]], 0 if begins else 1, slope.T, states)
        if self.bias is not None:
            self.bias[: slope.shape[1]] += slope.sum(0, dtype=self.bias.dtype)


class _Differentiated(torch.autograd.Function):
    """The loss, whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Autograd casts each to its input's dtype, so that half-precision gradients are rounded once.
        saved = ctx.saved_tensors
        known = [gradient for gradient in saved if gradient is not None]
        if upstream[0].is_cuda:
            for gradient in known:
                scale_(gradient, upstream[0])
        elif not (can_look(upstream[0]) and bool(upstream[0] == 1)):  # the head's gradient alone takes a twentieth of a step
            torch._foreach_mul_(known, upstream[0])  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *saved


def _product_of(sent: Tensor | Top, rows: slice, head: Head | None, vocab_size: int) -> Tensor:
    """The teacher's W h of some rows, or its logits where they are what was sent."""
    if isinstance(sent, Top):
        return sent.rows(rows).spread(vocab_size)
    return sent[rows] if head is None else head.product(sent[rows])


def _teacher(product: Tensor, head: Head | None, tokens: Tensor, vocab_size: int) -> tuple[Tensor, Probe]:
    """The teacher's log-probs ``[n, V]``, and what they show of it."""
    if product.shape[1] < vocab_size:
        raise ValueError(
            f"{product.shape[1]} logits for a vocabulary of {vocab_size}: model and tokenizer do not belong together"
        )
    logits = promote(product[:, :vocab_size]) if head is None else head.logits(product)
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = gather(logprobs, tokens)
    return logprobs, Probe(gather(logits, tokens) - chosen, chosen)


def _positions(states: Tensor, vocab_size: int, most: int | None = None) -> int:
    """Positions of a chunk."""
    sizes = SIZES[states.device.type]
    positions = max(1, sizes.chunk // vocab_size // sizes.positions) * sizes.positions
    return positions if most is None else min(positions, most)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """At most ``size`` positions each; an empty one where there are none, so that every name gets its sum."""
    for first in range(start, max(stop, start + 1), size):
        yield slice(first, min(first + size, stop))
