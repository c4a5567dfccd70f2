"""Rows of the replay buffer -> what one forward pass of the learner reads: dealt to ranks, cut into micro-batches, laid out.

Shape legend: B sequences, T response tokens, N predicted response tokens of the B sequences end to end,
V vocabulary, H hidden width of the teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from raykd.algorithms.base import Algorithm, Needs
from raykd.head import Head
from raykd.logprobs import mixture_logprobs
from raykd.packing import Layout, packed, padded
from raykd.payloads import Top
from raykd.records import Batch, Row, Scores, Source, Totals

CPU = torch.device("cpu")
Fetch = Callable[[Any], Scores]
"""A reference to a block of scores -> the block."""
Lay = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Layout]
"""``packing.packed`` or ``packing.padded``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """One summand of a step's loss: an algorithm on this rank's rows. Every rank names the same algorithms in the same order."""

    algorithm: Algorithm
    rows: list[Row]
    totals: Totals
    """Denominators over all ranks."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some rows. Entry n of the [N] tensors is a predicted response token; padding never enters them."""

    layout: Layout
    sequences: Tensor
    """[N] int64: which row the token belongs to."""
    positions: Tensor
    """[N] int64: which of the layout's positions predicts it."""
    slots: Tensor
    """[N] int64: its index within the response."""
    tokens: Tensor
    """[N] int64."""
    teacher: Tensor | Top | None
    """Hidden states [N, H], logits [N, V], or most probable tokens; None where its distribution is not needed."""
    needs_head: bool
    """``teacher`` is hidden states."""
    log_normaliser: Tensor
    """[N] of the teacher; empty where its distribution is not needed."""
    logprobs: Tensor
    """[N] of the teacher; empty likewise."""
    batch: Batch
    """[B, T], what ``per_sequence`` and ``token_weights`` see."""

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on ``device``."""
        return _moved(self, device)


def deal(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Rows of each rank, longest first: equal in number up to one, and about equal in tokens; the same for the same rows."""
    dealt: list[list[Row]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    ordered = sorted(rows, key=length, reverse=True)
    for start in range(0, len(ordered), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: tokens[rank])
        for rank, row in zip(lightest_first, ordered[start : start + ranks], strict=False):
            dealt[rank].append(row)
            tokens[rank] += length(row)
    return dealt


def length(row: Row) -> int:
    """Tokens of prompt and response."""
    return row.rollout.length


def micro_batches(rows: Sequence[Row], size: int, lay: Lay = padded) -> list[list[Row]]:
    """At most ``size`` rows each: packed, those of one prompt together; padded, those of similar length."""
    ordered = sorted(rows, key=lambda row: row.rollout.prompt_tokens if lay is packed else length(row), reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(
    rows: Sequence[Row],
    algorithm: Algorithm,
    totals: Totals,
    *,
    fetch: Fetch,
    teacher_head: Head | None,
    vocab_size: int,
    lay: Lay = padded,
    device: torch.device = CPU,
) -> MicroBatch:
    """Lay rows out as one micro-batch on ``device``. No rows give one token and N = 0: ranks without work still join the
    collectives. What the teacher sent, the most by far, is put together there, all else on the CPU."""
    layout = lay([row.rollout.prompt_tokens for row in rows], [row.rollout.tokens for row in rows])
    responses = [row.rollout.tokens for row in rows] or [()]
    firsts = [row.rollout.first_predicted for row in rows] or [0]
    predicted = [range(first, len(response)) for first, response in zip(firsts, responses, strict=True)]
    scores = [_scores(row, algorithm.needs, fetch) for row in rows] or [None]

    sequences = [b for b, slots in enumerate(predicted) for _ in slots]
    slots = [slot for slots in predicted for slot in slots]
    tokens = [responses[b][slot] for b, slot in zip(sequences, slots, strict=True)]
    positions = [layout.predictors[b][slot] for b, slot in zip(sequences, slots, strict=True)]
    teacher = _teacher_rows(scores, firsts, teacher_head, vocab_size, device) if algorithm.needs.distribution else _NO_TEACHER
    return MicroBatch(
        layout=layout,
        sequences=torch.tensor(sequences, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        tokens=torch.tensor(tokens, dtype=torch.int64),
        **teacher,
        batch=_batch(rows, responses, firsts, totals),
    ).to(device)


def _batch(
    rows: Sequence[Row],
    responses: Sequence[Sequence[int]],
    firsts: Sequence[int],
    totals: Totals,
) -> Batch:
    tokens = _padded(responses, 0, torch.int64)
    slots = torch.arange(tokens.shape[1])
    mask = (slots >= torch.tensor(firsts)[:, None]) & (slots < torch.tensor([len(response) for response in responses])[:, None])
    student = _padded([row.rollout.student_logprobs or () for row in rows] or [()], 0.0, torch.float32, tokens.shape[1])
    teacher = _padded([row.teacher_logprobs or () for row in rows] or [()], 0.0, torch.float32, tokens.shape[1])
    shares = torch.tensor([row.rollout.teacher_share for row in rows] or [0.0])[:, None]
    known = [_law_is_known(row) for row in rows]
    behaviour = torch.where(shares > 0, mixture_logprobs(student, teacher, shares), student)
    return Batch(
        tokens=torch.where(mask, tokens, 0),
        mask=mask,
        totals=totals,
        student_logprobs=torch.where(mask, student, 0.0),
        teacher_logprobs=torch.where(mask, teacher, 0.0),
        behaviour_logprobs=torch.where(mask & torch.tensor(known or [False])[:, None], behaviour, 0.0),
        by_student=torch.tensor([row.rollout.source.author is Source.STUDENT for row in rows] or [False]),
        rewards=torch.tensor([row.reward for row in rows] or [0.0]),
    )


def _law_is_known(row: Row) -> bool:
    """Whether the log-prob of every token under the law that it was drawn from can be told from what was recorded: not for
    data, for mixed text without the teacher's log-probs (where the algorithm needs none), at another temperature than 1."""
    written, mixed = row.rollout.source is not Source.DATASET, row.rollout.teacher_share > 0
    return written and row.rollout.temperature == 1 and not (mixed and row.teacher_logprobs is None)


def _scores(row: Row, needs: Needs, fetch: Fetch) -> Scores | None:
    """The scores of one row, or None where the algorithm does not ask for the teacher's distribution."""
    if needs is Needs.NOTHING:
        return None
    name = f"rollout {row.rollout.prompt_id}/{row.rollout.sample}"
    if (needs.sampled and row.teacher_logprobs is None) or (needs.distribution and row.scores is None):
        raise ValueError(f"{name} has no teacher scores, but the algorithm needs them; score it before the step")
    scores = fetch(row.scores).row(row.index) if needs.distribution else None
    for scored in (row.teacher_logprobs, None if scores is None else scores.logprobs):
        if scored is not None and len(scored) != len(row.rollout.tokens):
            raise ValueError(f"{name} has {len(row.rollout.tokens)} tokens but {len(scored)} scores: they are another row's")
    return scores


_NO_TEACHER: dict[str, Any] = {
    "teacher": None,
    "needs_head": False,
    "log_normaliser": torch.zeros(0),
    "logprobs": torch.zeros(0),
}


def _teacher_rows(
    scores: Sequence[Scores | None], firsts: Sequence[int], head: Head | None, vocab_size: int, device: torch.device
) -> dict[str, Any]:
    """The teacher's distribution of the predicted tokens as it was sent, and its probe [N]."""
    blocks = [(score, first) for score, first in zip(scores, firsts, strict=True) if score is not None]
    hidden = [score.hidden[first:].to(device) for score, first in blocks if score.hidden is not None]
    logits = [score.logits[first:].to(device) for score, first in blocks if score.logits is not None]
    tops = [score.top.rows(slice(first, None)) for score, first in blocks if score.top is not None]
    if sum(map(bool, (hidden, logits, tops))) > 1:
        raise ValueError("the rows of a micro-batch hold different forms of the teacher's distribution; send one of them")
    if hidden and head is None:
        raise ValueError("the scores hold the teacher's hidden states, but the learner has no teacher head; pass teacher_head")
    if tops:
        teacher = Top(*map(torch.cat, zip(*tops, strict=True)))
    else:
        teacher = torch.cat(hidden or logits or [torch.zeros(0, vocab_size)])
    return {
        "teacher": teacher,
        "needs_head": bool(hidden),
        "log_normaliser": torch.cat([score.log_normaliser[first:] for score, first in blocks] or [torch.zeros(0)]),
        "logprobs": torch.cat([score.logprobs[first:] for score, first in blocks] or [torch.zeros(0)]),
    }


def _padded(rows: Sequence[Sequence[float]], value: float, dtype: torch.dtype, width: int = 1) -> Tensor:
    """[B, max(width, longest)]; at least one column, since an empty axis has no maximum."""
    width = max(width, *(len(row) for row in rows))
    padded = torch.full((len(rows), width), value, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=dtype)
    return padded


def _moved(value: Any, device: torch.device) -> Any:
    """A dataclass of tensors, and of a batch of them, on another device."""
    moved = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            moved[field.name] = item.to(device, non_blocking=True)
        elif isinstance(item, Batch):
            moved[field.name] = _moved(item, device)
        elif isinstance(item, Top):
            moved[field.name] = Top(*(values.to(device, non_blocking=True) for values in item))
        elif isinstance(item, Layout):
            moved[field.name] = item.to(device)
    return replace(value, **moved)
