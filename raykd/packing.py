"""Prompts and responses -> what a model's body reads: laid end to end without padding where the architecture allows it.

    prompt a | response a1 | response a2 | prompt b + response b1        one row of S positions, S the number of real tokens

Every response attends to its prompt and to itself. A prompt that several responses share stands once: it is computed once, and
gets the gradients of all. Layers may see all of a text or a sliding window of it, and cap their scores (Gemma 2). Architectures
whose layers do more (chunks, attention sinks, recurrence) are read right-padded instead, one row a response; which it is,
``can_pack`` finds out by trying. Both give the same states.

Shapes: R rows, S positions, H hidden width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "raykd_packed"
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of packed and plain states, relative to the largest state."""

Tokens = Sequence[int]
PADDING = 0
"""Token at the end of shorter rows; nobody learns from it or looks at it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions that attend to each other causally, and to all of ``before``, a segment's own."""

    own: slice
    before: slice | None = None


class Ragged(NamedTuple):
    """The segments as flash attention wants them: one call for all."""

    keys: Tensor | None
    """Which positions are the keys of the segments, one segment after the other; None where they are the queries."""
    query_ends: Tensor
    """[segments + 1] int32, from 0."""
    key_ends: Tensor
    """[segments + 1] int32, from 0."""
    longest: tuple[int, int]
    """Most queries and most keys of any segment."""

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Ragged":
        seen = [(_positions(segment.before), _positions(segment.own)) for segment in segments]
        own, all_seen = [len(own) for _, own in seen], [len(before) + len(own) for before, own in seen]
        shared = any(segment.before is not None for segment in segments)
        ends = (torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (own, all_seen))
        return cls(
            torch.tensor([at for before, own in seen for at in chain(before, own)], device=device) if shared else None,
            *ends,
            longest=(max(own), max(all_seen)),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None = None) -> Tensor:
        """``[1, heads, S, width] -> [1, S, heads, width]``; ``window``: of how many positions, itself one of them, each sees."""
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        queries, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
        if self.keys is not None:
            keys, values = keys[self.keys], values[self.keys]
        seen = (window - 1 if window else -1, 0)  # before itself, -1 is all; behind itself
        ends = (self.query_ends, self.key_ends)
        found = varlen_attn(queries, keys, values, *ends, *self.longest, scale=scale, window_size=seen, **grouped)
        assert isinstance(found, Tensor)
        return found[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Token ids as the model reads them, and where each response is predicted."""

    input_ids: Tensor
    """[R, S] int64."""
    predictors: list[list[int]]
    """For each response, which of the R * S positions predicts each of its tokens; for the first token of a text without a
    prompt, which nothing predicts, its own."""
    position_ids: Tensor | None = None
    """[1, S] where packed."""
    segments: tuple[Segment, ...] | None = None
    """Packed layouts only: every position is in one segment, in order."""
    ragged: Ragged | None = None
    """Packed layouts on a GPU only: the segments as flash attention takes them."""

    def to(self, device: torch.device) -> "Layout":
        """A copy on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            ragged=None if self.segments is None or device.type != "cuda" else Ragged.of(self.segments, device),
        )

    def states(self, body: Callable[..., Any]) -> Tensor:
        """The last hidden states ``[R * S, H]``."""
        packed: dict[str, Any] = {}
        if self.segments is not None:
            packed = {"position_ids": self.position_ids, "segments": self.segments, "ragged": self.ragged}
        return body(input_ids=self.input_ids, use_cache=False, **packed).last_hidden_state.flatten(0, 1)


def padded(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Layout:
    """One row a response. No attention mask: under causal attention nothing real looks at padding on its right."""
    rows = [[*prompt, *response][:-1] or [PADDING] for prompt, response in zip(prompts, responses, strict=True)] or [[PADDING]]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PADDING)
    width = ids.shape[1]
    predictors = [
        [row * width + max(0, len(prompt) - 1 + slot) for slot in range(len(response))]
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    return Layout(input_ids=ids, predictors=predictors)


def packed(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Layout:
    """One row, the responses of a prompt behind it. The last token of a response predicts nothing and is left out."""
    asked: dict[Tokens, list[int]] = {}
    for index, prompt in enumerate(prompts):
        asked.setdefault(tuple(prompt), []).append(index)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predictors: list[list[int]] = [[]] * len(responses)

    def lay(tokens: Tokens, first_position: int) -> slice:
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        return slice(start, len(ids))

    for prompt, indices in asked.items():
        shared = lay(prompt, 0)
        placed = [lay(responses[index][:-1], len(prompt)) for index in indices]
        for index, own in zip(indices, placed, strict=True):
            first = shared.stop - 1 if prompt else own.start
            predictors[index] = [first, *range(own.start, own.stop)][: len(responses[index])]
        if len(indices) == 1:
            segments.append(Segment(slice(shared.start, placed[0].stop)))
        else:
            segments += [Segment(shared), *(Segment(own, shared if prompt else None) for own in placed)]
    if not ids:
        segments = [Segment(lay([PADDING], 0))]
    return Layout(
        input_ids=torch.tensor([ids]),
        predictors=predictors,
        position_ids=torch.tensor([positions]),
        segments=tuple(segment for segment in segments if segment.own.stop > segment.own.start),
    )


def keep_softcap(model: PreTrainedModel) -> None:
    """Have an architecture with capped attention scores compute them: transformers' usual attention leaves the cap out."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed and plain states are the same; if so, the model is set up to read both."""
    keep_softcap(model)
    usual = str(model.config._attn_implementation)
    prompts, responses = ((1, 2, 3), (4, 5), (4, 5), ()), ((6, 7, 8), (9, 10), (11, 12, 13), (14, 15))
    together, apart = (lay(prompts, responses).to(model.device) for lay in (packed, padded))
    with _narrow_windows(model):
        plain = apart.states(model.base_model)
        try:
            model.set_attn_implementation(ATTENTION)
            found = together.states(model.base_model)
        except (TypeError, ValueError):  # its attention takes other arguments, or asks for what is not done here
            error = math.inf
        else:
            pairs = zip(together.predictors, apart.predictors, strict=True)
            error = max(float((found[one] - plain[other]).abs().max()) for one, other in pairs)
    same = error <= TOLERANCE[plain.dtype] * float(plain.abs().max())
    if not same:
        model.set_attn_implementation(usual)
    return same


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Windows and chunks of two positions: narrower than the texts of a trial, which would not show them otherwise."""
    owners = [model.base_model.config, *model.modules()]
    widths = [(owner, name) for owner in owners for name in ("sliding_window", "attention_chunk_size")]
    before = [(*width, value) for width in widths if isinstance(value := getattr(*width, None), int) and value > 0]
    try:
        for owner, name, _ in before:
            setattr(owner, name, 2)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    ragged: Ragged | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment alone; ``[1, heads, S, width] -> [1, S, heads, width]``. Without segments, of whole rows."""
    asked = [name for name in ("position_bias", "s_aux") if others.get(name) is not None]
    if asked or attention_mask is not None or dropout:
        raise ValueError(f"packed attention knows no {', '.join(asked) or 'mask and no dropout'}")
    rules = scaling, sliding_window or None, softcap
    if segments is None:
        return _attend(query, key, value, *rules).transpose(1, 2).contiguous(), None
    if ragged is not None and softcap is None and _flash_takes(query):
        return ragged.attend(query, key, value, *rules[:2]), None

    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16 and query.requires_grad:
        # The backward pass on a CPU would compile kernels of bfloat16 for every length of a text: 5 ms and 6 MB that stay.
        query, key, value = query.float(), key.float(), value.float()
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    lengths = [segment.own.stop - segment.own.start for segment in segments]
    queries, keys, values = (heads.split(lengths, 2) for heads in (query, key, value))
    places = {segment.own.start: place for place, segment in enumerate(segments)}

    def attend(place: int, before: slice | None) -> Tensor:
        k, v = keys[place], values[place]
        if before is not None:
            k, v = (torch.cat([heads[places[before.start]], heads[place]], 2) for heads in (keys, values))
        return _attend(queries[place], k, v, *rules)

    attended = torch.cat([attend(place, segment.before) for place, segment in enumerate(segments)], 2)
    return attended.transpose(1, 2).contiguous().to(dtype), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None) -> Tensor:
    """Causal attention ``[R, heads, queries, width]`` of the last positions of the keys, each to at most ``window`` of them:
    softmax(s) v, or softmax(c tanh(s / c)) v with a softcap c, of the scaled scores s."""
    size = q.shape[2], k.shape[2]
    first = size[1] - size[0]
    mask = None
    if first or softcap or (window and window < size[1]):
        mask = torch.ones(size, dtype=torch.bool, device=q.device).tril(first)
        mask = mask.triu(first + 1 - window) if window else mask
    grouped = q.shape[1] != k.shape[1]
    if mask is None or softcap is None:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    scores = (q @ k.transpose(2, 3)) * (scale or q.shape[3] ** -0.5)
    capped = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    return torch.softmax(capped, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def _flash_takes(query: Tensor) -> bool:
    """Whether flash attention has kernels for these heads."""
    is_half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    return is_half and width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _positions(at: slice | None) -> range:
    return range(0) if at is None else range(at.start, at.stop)


AttentionInterface.register(ATTENTION, packed_attention)
