"""What a teacher sends of its distributions beside hidden states and logits, and how the learner knows that it has arrived.

Shapes: N positions, n positions of a chunk, V vocabulary, K tokens kept.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted difference, in nats, between the teacher's probe and its reconstruction, by the dtype that travelled."""


class Probe(NamedTuple):
    """What the teacher itself computed at the scored positions, NaN where it did not look; a reconstruction must agree."""

    log_normaliser: Tensor
    """logsumexp of the logits over the true vocabulary; [N] float32."""
    logprobs: Tensor
    """log p of the response token; [N] float32."""

    def write(self, at: slice, log_normaliser: Tensor, logprobs: Tensor) -> None:
        """Record the numbers of some positions."""
        self.log_normaliser[at], self.logprobs[at] = log_normaliser, logprobs


class Top(NamedTuple):
    """The most probable tokens of each position, and all others together."""

    tokens: Tensor
    """[N, K] int32."""
    logprobs: Tensor
    """[N, K + 1] float32; the last is that of all other tokens."""

    def rows(self, at: slice) -> "Top":
        """A view of some positions."""
        return Top(self.tokens[at], self.logprobs[at])

    def spread(self, vocab_size: int) -> Tensor:
        """Log-probs ``[n, V]`` with the same K tokens on top and all others alike: to a divergence that sees the others as one
        event (``divergences.top_k``) they are the teacher's own."""
        others = self.logprobs[:, -1:] - math.log(vocab_size - self.tokens.shape[1])
        return others.repeat(1, vocab_size).scatter_(1, self.tokens.long(), self.logprobs[:, :-1])


def payload_bytes(hidden_size: int, vocab_size: int, dtype: torch.dtype, top_k: int | None = None) -> dict[str, int]:
    """Bytes of one response token by payload: hidden states in the teacher's dtype; logits in float32; ids and log-probs of the
    ``top_k`` tokens that a divergence looks at, and of all others. The 8 bytes of the probe come on top."""
    sizes = {"hidden": hidden_size * dtype.itemsize, "logits": vocab_size * 4}
    return sizes if top_k is None or top_k >= vocab_size else sizes | {"top": 8 * top_k + 4}


def chosen_payload(asked: str, sizes: Mapping[str, int]) -> str:
    """What is asked for, or where that is "auto" what has the fewest bytes."""
    return min(sizes, key=lambda payload: sizes[payload]) if asked == "auto" else asked


def unwritten(tokens: Tensor) -> Probe:
    """To be filled in place: small tensors that outlive a tile would keep the memory of large ones from being used again."""
    return Probe(*torch.empty(2, len(tokens), device=tokens.device).unbind())


def compare(own: Probe, rebuilt: Probe, dtype: torch.dtype) -> None:
    """One synchronisation when all is well; the diagnosis is worked out only on failure."""
    if len(own.logprobs) != len(rebuilt.logprobs) or len(own.log_normaliser) != len(rebuilt.log_normaliser):
        raise ValueError(f"the teacher's probe has {len(own.logprobs)} rows for {len(rebuilt.logprobs)} response tokens")
    tolerance = TOLERANCE[dtype]
    probed, broken = ~own.logprobs.isnan(), ~rebuilt.logprobs.isfinite()
    wrong_normaliser, wrong_logprob = (~((a - b).abs() <= tolerance) & probed for a, b in zip(own, rebuilt, strict=True))
    wrong = wrong_normaliser | wrong_logprob | broken
    if not bool(wrong.any()):
        return
    row, count = int(wrong.nonzero()[0]), int(wrong.sum())
    if bool(broken.any()) or not bool(torch.isfinite(torch.stack([*own])[:, probed]).all()):
        cause = "some values are not finite: the states overflowed; never send float16 for a bfloat16 teacher"
    elif not bool(wrong_normaliser.any()):
        cause = (
            "the normalisers agree, so the head is right, but the tokens are not those scored: off by one, or another rollout's"
        )
    elif count < int(probed.sum()) // 2:
        cause = "most rows agree, so the head is right: these rows are damaged or stale; score them again"
    else:
        cause = (
            "the head is not this teacher's, or the states miss the final norm, or scale, bias or soft-cap of the logits are not"
            " set, or the vocabulary is cut elsewhere"
        )
    raise ValueError(
        f"the teacher's distribution could not be rebuilt at {count} of {int(probed.sum())} positions. Likely: {cause}."
        f" First at row {row}: log-normaliser {float(own.log_normaliser[row]):.4f} at the teacher and"
        f" {float(rebuilt.log_normaliser[row]):.4f} here, log-prob {float(own.logprobs[row]):.4f} and"
        f" {float(rebuilt.logprobs[row]):.4f}; tolerance {tolerance} for {dtype}"
    )
