"""Hidden states times an output head -> a weighted loss over the vocabulary, a chunk of positions at a time: never ``[N, V]``.

Shapes: N positions, n positions of a chunk, H hidden width, V true vocabulary (heads may be padded beyond it).

    student hidden -> W h [n, V] -> log-softmax --+
    teacher hidden -> W h [n, V] -> log-softmax --+-> reduce -> {name: [n]}, the loss among them -> weighted sum
                                                                                                        |
    gradients of hidden states, weight, bias <- two products <- slope: d sum / d (W h) [n, V] <- autograd

Weights are known beforehand and no position's loss depends on another's, so that a chunk is differentiated as soon as it exists
and then forgotten: four matrix products, none of them twice. Liger-Kernel's fused losses (arXiv 2410.10989) do so, too. Between
the products a chunk is taken in tiles, in which autograd differentiates whatever ``reduce`` does. Slopes have the dtype of the
head. On a CPU a tile's takes the place of its W h. On a GPU they are kept, as many as have room where the head's gradient would
be summed in float32: mostly all, and then that is one product, rounded once. Memory: W h of a chunk for both models, a few tiles,
the slopes on a GPU, and the gradients themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from raykd.cpu_products import PackedWeight, add_outer
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
    rows: int
    """A head's are made a multiple of these."""
    slopes_kept: bool
    """Whether those of several chunks are multiplied together."""


SIZES = {
    # Chunks of 30 MiB, 156 positions at V = 50,257: what is larger than 32 MiB the C library gives back to the system at once,
    # and getting it again page by page takes longer than computing on it. Tiles of 4 MiB: the many passes between logits and
    # slope stay in the caches.
    "cpu": Sizes(chunk=15 * 2**19, positions=1, tile=2**20, rows=1, slopes_kept=False),
    # With fewer positions the head is read for longer than it is multiplied. A head of an odd number of rows takes seven times as
    # long as one of a few rows more.
    "cuda": Sizes(chunk=2**25, positions=256, tile=2**62, rows=64, slopes_kept=True),
}

RECOMPUTE: dict[str, Any] = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}
"""To torch.compile on a GPU: log-probs are computed from W h wherever they are looked at, rather than written and read again."""
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
    packed: PackedWeight | None = None
    """The same weight as a CPU multiplies by bfloat16."""
    vocab_size: int | None = None
    """Rows of the weight that make logits; all where it is None."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, H] -> [n, V]``."""
        return self.logits(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """W h, of every row. That of halves is kept in float32: a bfloat16 logit near 16 would be off by up to 0.06."""
        hidden = hidden.to(self.weight.dtype)
        return _product(hidden, self.weight.T) if self.packed is None else self.packed.product(hidden)

    def logits(self, product: Tensor) -> Tensor:
        """Bias, scale and soft-cap; ``[n, V]``, the product's own memory where there are none."""
        product = product[:, : self.vocab_size]
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
        return replace(self, weight=self.weight[:vocab_size], bias=bias, packed=None)

    def to(self, device: torch.device) -> "Head":
        """The same on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, packed=None)

    def frozen(self) -> "Head":
        """To multiply by and not to differentiate: without the weight where it is packed, of which only shape and dtype stay."""
        return self if self.packed is None else replace(self, weight=self.weight.to("meta"))

    def ready(self, vocab_size: int) -> "Head":
        """Cut to the true vocabulary, and such that its products are fast: on a CPU, where those of halves would be rounded to
        halves, packed or else widened; on a GPU with rows beyond the vocabulary that are computed and not looked at. A frozen
        model's is made ready once."""
        if self.packed is not None and len(self.weight) == vocab_size:
            return self
        rows = vocab_size + -vocab_size % SIZES[self.weight.device.type].rows
        head, weight = self.cut(vocab_size), self.weight[:rows]
        if len(weight) < rows:
            weight = pad(weight, (0, 0, 0, rows - len(weight)))
        with suppress(NotImplementedError):
            return replace(head, weight=weight, vocab_size=vocab_size, packed=PackedWeight(weight))
        return replace(head, weight=promote(weight) if weight.is_cpu else weight, vocab_size=vocab_size)


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
    sizes = SIZES[hidden.device.type]
    size = _positions(hidden, vocab_size, chunk)
    together = _positions_together(size, student.weight) if sizes.slopes_kept else size
    gradients = _Gradients.of(hidden, head, student, summed=len(tokens) > together)
    totals: dict[str, Tensor] = {}
    rebuilt = unwritten(tokens)

    def differentiate(rows: slice, states: Tensor, slope: Tensor | None) -> Tensor:
        """A chunk's slope, written to ``slope``, or over its W h. A function, as ``take``: what it holds ends with it."""
        product = student.product(states)
        if slope is None:
            slope = product.view(student.weight.dtype)[:, : product.shape[1]]  # of halves, the first half of each row
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
        if not sizes.slopes_kept:
            slope = differentiate(block, states, None)
        else:
            slope = states.new_empty(len(states) if gradients.wanted else 0, len(student.weight))
            for rows in _slices(block.start, block.stop, size):
                own = slice(rows.start - block.start, rows.stop - block.start)
                differentiate(rows, states[own], slope[own])
        if gradients.wanted:
            gradients.add(block, slope, states, student.weight)

    with torch.no_grad():
        for block in _slices(0, len(tokens), together):
            take(block)
    if probe is not None and teacher_states is not None:
        compare(probe, rebuilt, torch.float32 if isinstance(teacher_states, Top) else teacher_states.dtype)
    gradients = gradients.of_rows(len(head.weight))
    return _Differentiated.apply(totals.pop("loss"), gradients, hidden, head.weight, head.bias), totals


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
    """Of a tile, everything between the products: the loss, and beside it all that is found."""
    student, guide = heads
    logprobs, known = (None, ()) if teacher is None else _teacher(teacher, guide, tokens, vocab_size)
    values = reduce(torch.log_softmax(student.logits(product), dim=-1), logprobs, tokens, given)
    loss = (values["loss"] * weights.to(product.dtype)).sum()
    return loss, ({name: value.detach().sum() for name, value in values.items()} | {"loss": loss.detach()}, known)


def _differentiate(product: Tensor, slope: Tensor, wanted: bool, compiled: bool, *tile: Any) -> Found:
    """What a tile gives; d loss / d (W h) is written to ``slope``, which may be W h itself, where it is wanted."""
    if not wanted:
        return (_compiled(_sums, product.device.type) if compiled else _sums)(product, *tile)[1]
    if compiled:
        gradient, found = _compiled(_gradient_and_sums, product.device.type)(product, slope.dtype, *tile)
    else:
        with torch.enable_grad():
            loss, found = _sums(product.requires_grad_(), *tile)
        (gradient,) = torch.autograd.grad(loss, product)
    slope.copy_(gradient)
    return found


def _gradient_and_sums(product: Tensor, dtype: torch.dtype, *tile: Any) -> tuple[Tensor, Found]:
    """The same as a function of tensors alone, which becomes one program."""
    gradient, found = torch.func.grad(_sums, has_aux=True)(product, *tile)
    return gradient.to(dtype), found


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


class _Gradients(NamedTuple):
    """Of what is learned; None of what is not."""

    hidden: Tensor | None
    weight: Tensor | None
    """Of every row of the head that is multiplied."""
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: Head, ready: Head, *, summed: bool) -> "_Gradients":
        """To be written, but for the bias's and for rows that ``head`` has and ``ready`` has not. In at least float32, so that
        they are rounded once; in their own dtype where a GPU need not sum over blocks."""

        def room(value: Tensor | None, rows: int) -> Tensor | None:
            if value is None or not (value.requires_grad and torch.is_grad_enabled()):
                return None
            dtype = torch.promote_types(value.dtype, torch.float32) if summed or value.is_cpu else value.dtype
            return value.new_empty(rows, *value.shape[1:], dtype=dtype)

        gradients = cls(
            hidden=room(hidden, len(hidden)),
            weight=room(head.weight, max(len(head.weight), len(ready.weight))),
            bias=None if head.bias is None else room(head.bias, len(head.bias)),
        )
        if gradients.weight is not None:
            gradients.weight[len(ready.weight) :] = 0
        if gradients.bias is not None:
            gradients.bias.zero_()
        return gradients

    def of_rows(self, rows: int) -> "_Gradients":
        """Without those of rows that only the product has."""
        return self if self.weight is None else self._replace(weight=self.weight[:rows])

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in self)

    def add(self, rows: slice, slope: Tensor, states: Tensor, weight: Tensor) -> None:
        """Those of some positions, in order: ``slope`` is d loss / d (W h), a column for each row of ``weight``."""
        if self.hidden is not None:
            if slope.is_cpu:  # whole sums: of halves, rounded here as they would be by autograd
                self.hidden[rows] = slope @ weight
            else:
                _add_product(self.hidden[rows], 0, slope, weight)
        if self.weight is not None:
            total, beta = self.weight[: len(weight)], 0 if rows.start == 0 else 1
            _add_product(total, beta, slope.T, states)
        if self.bias is not None:
            rows_of_both = min(len(self.bias), len(weight))
            self.bias[:rows_of_both] += slope.sum(0, dtype=self.bias.dtype)[:rows_of_both]


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
        saved = ctx.saved_tensors
        if not (can_look(upstream[0]) and bool(upstream[0] == 1)):  # a pass over the head's gradient takes a twentieth of a step
            known = [gradient for gradient in saved if gradient is not None]
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


def _product(first: Tensor, second: Tensor) -> Tensor:
    """first @ second, in at least float32."""
    if first.is_cuda and first.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(first, second, out_dtype=torch.float32)
    return promote(first) @ promote(second)


def _add_product(total: Tensor, beta: int, first: Tensor, second: Tensor) -> None:
    """total = beta total + first @ second, without a temporary; beta is 0 or 1."""
    if first.dtype == total.dtype:
        total.addmm_(first, second, beta=beta)
    elif first.is_cuda:
        torch.addmm(total, first, second, beta=beta, out_dtype=total.dtype, out=total)
    else:  # of halves
        add_outer(total, first.T, second, beta=beta)


def _positions(states: Tensor, vocab_size: int, most: int | None = None) -> int:
    """Of a chunk."""
    sizes = SIZES[states.device.type]
    positions = max(1, sizes.chunk // vocab_size // sizes.positions) * sizes.positions
    return positions if most is None else min(positions, most)


def _positions_together(size: int, weight: Tensor) -> int:
    """Whole chunks, whose slopes have room where the gradient of the head would be summed in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32).itemsize
    return max(1, weight.shape[1] * wide // weight.itemsize // size) * size


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """At most ``size`` positions each; an empty one where there are none, so that every name gets its sum."""
    for first in range(start, max(stop, start + 1), size):
        yield slice(first, min(first + size, stop))
