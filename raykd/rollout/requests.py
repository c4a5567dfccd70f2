"""What is asked of a rollout worker and what an engine answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One response to write."""

    prompt_id: str
    sample: int
    prompt_tokens: tuple[int, ...]
    salt: int
    """What makes the draws of one step differ from another's."""
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What one engine wrote."""

    tokens: tuple[int, ...]
    """EOS included when it was written."""
    logprobs: tuple[float, ...]
    """log-prob of each token under the writer, at temperature 1 whatever it was sampled at."""
    finished: bool
    """False when ``max_tokens`` cut it."""
    scored: tuple[float, ...] = ()
    """Log-probs under the writer of the tokens before, from where it was asked to score them."""


class Writer(Protocol):
    """Anything that continues a text it keeps: an engine, or a handle on one elsewhere."""

    async def complete(self, text: Sequence[int], max_tokens: int, seed: int, *, session: str) -> Completion:
        """Continue ``text`` until EOS or for ``max_tokens``.

        ``session`` names a text that grows from call to call: what was computed of it is kept until ``forget``.
        """
        ...

    async def forget(self, session: str) -> None:
        """The text of a session is complete."""
        ...


class ScoringWriter(Writer, Protocol):
    """A writer that also says how likely it finds what others wrote."""

    async def complete(
        self, text: Sequence[int], max_tokens: int, seed: int, *, session: str, score_from: int | None = None
    ) -> Completion:
        """Score the tokens of ``text`` from position ``score_from`` on, then continue it."""
        ...


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on nothing but ``parts``: the same in every process, on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
