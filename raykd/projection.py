"""Hidden states times an output head, reduced over the vocabulary a chunk of positions at a time: never ``[N, V]`` as a whole.

Shapes: N positions, n positions of a chunk, H hidden width, V true vocabulary (heads may be padded beyond it).

    chunk:  student hidden -> student head -> cut to V -> log-softmax --+
            teacher hidden -> teacher head -> cut to V -> log-softmax --+-> reduce -> {name: [n]}
    backward recomputes each chunk where there are several, so memory is bounded by one chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from raykd.logprobs import gather, promote
from raykd.records import Scores

Projection = Callable[[Tensor], Tensor]
"""Hidden states ``[n, H]`` to logits ``[n, V or more]``: a ``Head``, or the student's own output module."""
Reduce = Callable[[Tensor, Tensor | None, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""Student and teacher log-probs ``[n, V]``, tokens ``[n]`` and what is given of them ``{name: [n]}``, to ``{name: [n]}``: an
algorithm's ``per_token``."""

CHUNK_ELEMENTS = 2**25
"""Logits of one chunk when no chunk is asked for: 128 MiB in float32, 1,048 positions at V = 32,000."""

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted difference, in nats, between the teacher's probe and its reconstruction, by the dtype that travelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A frozen output head: logits = softcap * tanh(scale * (W h + b) / softcap), float32 (float64 for float64 weights)."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, H] -> [n, V]``. The product of halves is kept in float32: a bfloat16 logit near 16 would be off by up to 0.06."""
        hidden = hidden.to(self.weight.dtype)
        if hidden.is_cuda and self.weight.dtype in (torch.float16, torch.bfloat16):
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        else:
            logits = promote(hidden) @ promote(self.weight).T
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cut(self, vocab_size: int) -> "Head":
        """The head of the true vocabulary: the first ``vocab_size`` rows, without a copy."""
        if vocab_size > len(self.weight):
            raise ValueError(
                f"the head has {len(self.weight)} rows but the tokenizer {vocab_size} tokens: it is another model's head"
            )
        return replace(self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size])


class Probe(NamedTuple):
    """What the teacher itself computed at the scored positions; the learner's reconstruction must agree."""

    log_normaliser: Tensor
    """logsumexp of the logits over the true vocabulary; [N] float32."""
    logprobs: Tensor
    """log p of the response token; [N] float32."""

    @classmethod
    def of(cls, scores: Scores) -> "Probe":
        return cls(scores.log_normaliser, scores.logprobs)


def per_token(
    student_hidden: Tensor,
    student_head: Projection,
    tokens: Tensor,
    reduce: Reduce,
    *,
    vocab_size: int,
    given: dict[str, Tensor] | None = None,
    chunk: int | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Projection | None = None,
    teacher_logits: Tensor | None = None,
    probe: Probe | None = None,
    num_chunks: int = 1,
) -> dict[str, Tensor]:
    """``reduce`` on every position, ``[N, H], [N] -> {name: [N]}``, both heads cut to ``vocab_size`` before any softmax.

    The teacher comes as ``teacher_hidden`` with ``teacher_head``, as ``teacher_logits`` ``[N, V]``, or not at all. With ``probe``
    the teacher's distribution is compared on the way (ValueError when it is not the teacher's own). The heads are always called,
    never read: under ZeRO-3 that gathers their weights, and ranks must then call equally often, so ``num_chunks`` is the number
    of chunks of the rank with the most positions; missing chunks run on a row that counts for nothing but stays connected.
    """
    if (teacher_hidden is None) != (teacher_head is None) or (teacher_hidden is not None and teacher_logits is not None):
        raise ValueError("per_token: give teacher_hidden with teacher_head, or teacher_logits, or neither")
    teacher_states = teacher_hidden if teacher_hidden is not None else teacher_logits
    if probe is not None and teacher_states is None:
        raise ValueError("per_token: a probe needs teacher_hidden or teacher_logits to compare with")

    def reduce_chunk(
        hidden: Tensor, states: Tensor | None, chosen: Tensor, given: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Probe | None]:
        student = torch.log_softmax(_cut(student_head(hidden), vocab_size), dim=-1)
        if states is None:
            return reduce(student, None, chosen, given), None
        teacher, rebuilt = _teacher(states, teacher_head, chosen, vocab_size)
        return reduce(student, teacher, chosen, given), rebuilt

    reduced: list[dict[str, Tensor]] = []
    rebuilt: list[Probe] = []
    chunks = list(_chunks(len(tokens), chunk, vocab_size, num_chunks))
    recomputed = partial(checkpoint, reduce_chunk, use_reentrant=False, preserve_rng_state=False)
    run_chunk = reduce_chunk if len(chunks) == 1 else recomputed  # a single chunk is the bound: recomputing it would save nothing
    for rows in chunks:
        states = None if teacher_states is None else _rows(teacher_states, rows)
        facts = {name: _rows(values, rows) for name, values in (given or {}).items()}
        values, chunk_probe = run_chunk(_rows(student_hidden, rows), states, _rows(tokens, rows), facts)
        reduced.append(values)
        if chunk_probe is not None:
            rebuilt.append(chunk_probe)
    if probe is not None and teacher_states is not None:
        _compare(probe, _join_probes(rebuilt, len(tokens)), teacher_states.dtype)
    return {name: _join([values[name] for values in reduced], len(tokens)) for name in reduced[0]}


@torch.no_grad()
def teacher_probe(states: Tensor, head: Projection | None, tokens: Tensor, vocab_size: int, chunk: int | None = None) -> Probe:
    """What ``Scores`` carries as its probe, from the teacher's hidden states ``[N, H]``, or from logits when ``head`` is None."""
    chunks = _chunks(len(tokens), chunk, vocab_size, 1)
    return _join_probes([_teacher(_rows(states, rows), head, _rows(tokens, rows), vocab_size)[1] for rows in chunks], len(tokens))


def verify_scores(scores: Scores, head: Projection | None, tokens: Tensor, vocab_size: int, chunk: int | None = None) -> None:
    """Raise ValueError, saying what is likely wrong, unless ``scores`` and ``head`` give back what the teacher computed itself.

    ``per_token(probe=...)`` makes the same check at no extra cost.
    """
    states = scores.hidden if scores.hidden is not None else scores.logits
    if states is None:
        raise ValueError("the scores carry neither hidden states nor logits: there is no distribution to verify")
    if not len(states) == len(tokens) == len(scores.log_normaliser) == len(scores.logprobs):
        raise ValueError(
            f"the scores have {len(states)} rows of states, {len(scores.log_normaliser)} normalisers and {len(scores.logprobs)}"
            f" log-probs for {len(tokens)} response tokens: offsets and responses belong to different rollouts"
        )
    rebuilt = teacher_probe(states, None if scores.hidden is None else head, tokens, vocab_size, chunk)
    _compare(Probe.of(scores), rebuilt, states.dtype)


@torch.no_grad()
def _teacher(states: Tensor, head: Projection | None, tokens: Tensor, vocab_size: int) -> tuple[Tensor, Probe]:
    """The teacher's log-probs ``[n, V]``, and the probe they give."""
    logits = _cut(states if head is None else head(states), vocab_size)
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits - log_normaliser[:, None]
    return logprobs, Probe(log_normaliser, gather(logprobs, tokens))


def _compare(own: Probe, rebuilt: Probe, dtype: torch.dtype) -> None:
    """One synchronisation when all is well; the diagnosis is worked out only on failure."""
    if len(own.logprobs) != len(rebuilt.logprobs) or len(own.log_normaliser) != len(rebuilt.log_normaliser):
        raise ValueError(f"the teacher's probe has {len(own.logprobs)} rows for {len(rebuilt.logprobs)} response tokens")
    tolerance = TOLERANCE[dtype]
    wrong_normaliser, wrong_logprob = (~((a - b).abs() <= tolerance) for a, b in zip(own, rebuilt, strict=True))
    wrong = wrong_normaliser | wrong_logprob
    if not bool(wrong.any()):
        return
    row, count = int(wrong.nonzero()[0]), int(wrong.sum())
    if not bool(torch.isfinite(torch.stack([*own, *rebuilt])).all()):
        cause = "some values are not finite: the states overflowed; never send float16 for a bfloat16 teacher"
    elif not bool(wrong_normaliser.any()):
        cause = (
            "the normalisers agree, so the head is right, but the tokens are not those scored: off by one, or another rollout's"
        )
    elif count < len(wrong) // 2:
        cause = "most rows agree, so the head is right: these rows are damaged or stale; score them again"
    else:
        cause = (
            "the head is not this teacher's, or the states miss the final norm, or scale, bias or soft-cap of the logits are not"
            " set, or the vocabulary is cut elsewhere"
        )
    raise ValueError(
        f"the teacher's distribution could not be rebuilt at {count} of {len(wrong)} positions. Likely: {cause}."
        f" First at row {row}: log-normaliser {float(own.log_normaliser[row]):.4f} at the teacher and"
        f" {float(rebuilt.log_normaliser[row]):.4f} here, log-prob {float(own.logprobs[row]):.4f} and"
        f" {float(rebuilt.logprobs[row]):.4f}; tolerance {tolerance} for {dtype}"
    )


def _cut(logits: Tensor, vocab_size: int) -> Tensor:
    if logits.shape[-1] < vocab_size:
        raise ValueError(
            f"{logits.shape[-1]} logits for a vocabulary of {vocab_size}: model and tokenizer do not belong together"
        )
    return promote(logits[:, :vocab_size])


def _chunks(num_rows: int, chunk: int | None, vocab_size: int, num_chunks: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` positions, at least one and at least ``num_chunks`` of them; those past the end are empty."""
    size = max(1, CHUNK_ELEMENTS // vocab_size) if chunk is None else chunk
    for index in range(max(-(-num_rows // size), num_chunks, 1)):
        yield slice(min(index * size, num_rows), min((index + 1) * size, num_rows))


def _rows(values: Tensor, rows: slice) -> Tensor:
    """The rows of a chunk; for an empty chunk one row of zeros, connected to the graph, so that backward visits every chunk."""
    if rows.start == rows.stop:
        return values.new_zeros((1, *values.shape[1:])) + values[:0].sum().to(values.dtype)
    return values[rows]


def _join(parts: list[Tensor], num_rows: int) -> Tensor:
    """The chunks end to end; rows of empty chunks, which come last, are dropped but stay in the graph with weight 0."""
    joined = torch.cat(parts)
    idle = joined[num_rows:]
    if not len(idle):
        return joined
    return joined[:num_rows] + idle.masked_fill(torch.ones_like(idle, dtype=torch.bool), 0.0).sum()


def _join_probes(parts: list[Probe], num_rows: int) -> Probe:
    return Probe(*(torch.cat(part)[:num_rows] for part in zip(*parts, strict=True)))
