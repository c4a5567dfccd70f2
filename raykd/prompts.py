"""The prompts of a run: ids in one block, and the order in which they are taken.

Prompts      -> tokenised prompts and their responses, as a sequence of Prompt
PromptStream -> a shuffled, endless, resumable stream over them
Data         -> everything that a run learns from and is measured on
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np

from raykd.records import Prompt


class Prompts(Sequence[Prompt]):
    """Tokenised prompts with their responses, in 4 bytes a token and 40 a prompt: a tuple of Python's takes 43 a token.

    A slice, or an array of indices, gives prompts that share the tokens.
    """

    def __init__(self, label: str, tokens: np.ndarray, places: np.ndarray) -> None:
        """``label``: what stands before the number of a row in a prompt's id. ``tokens``: int32, prompt and response end to end.
        ``places`` [prompts, 5]: row, first token, tokens of the prompt, tokens of the response, whether it is finished."""
        self._label, self.tokens, self._places = label, tokens, places

    @classmethod
    def collect(cls, label: str, rows: Iterable[tuple[int, Sequence[int], Sequence[int], bool]]) -> "Prompts":
        """From (row, prompt, response, finished) of each."""
        tokens, places = array("i"), array("q")
        for row, prompt, response, finished in rows:
            places.extend((row, len(tokens), len(prompt), len(response), finished))
            tokens.extend(prompt)
            tokens.extend(response)
        return cls(label, np.asarray(tokens), np.asarray(places).reshape(-1, 5))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> "Prompts": ...
    def __getitem__(self, index: int | slice | np.ndarray) -> "Prompt | Prompts":
        if isinstance(index, slice | np.ndarray):
            return Prompts(self._label, self.tokens, self._places[index])
        row, start, prompt, response, finished = self._places[index].tolist()
        ids = tuple(self.tokens[start : start + prompt + response].tolist())
        return Prompt(id=f"{self._label}{row}", tokens=ids[:prompt], response=ids[prompt:], finished=bool(finished))


Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class Data:
    """What a run learns from and is measured on: tokenised once, before anything starts."""

    prompts: "PromptStream[Prompt]"
    held_out: Sequence[Prompt]
    decode: Callable[[Sequence[int]], str]
    text: "PromptStream[Prompt] | None"
    vocab_size: int
    """How many ids student and teacher share; no text has another."""
    left_out: str = ""
    """A sentence on the rows that nothing is learned from, if there are any."""

    def state(self) -> dict[str, Any]:
        """Where prompts and text stand."""
        return {"prompts": self.prompts.state(), "text": self.text.state() if self.text else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``; ValueError where it is not of the same rows."""
        self.prompts.restore(state["prompts"])
        if self.text is not None:
            self.text.restore(state["text"])


class PromptStream(Generic[Item]):
    """Endless shuffled passes over a list; the order depends on ``seed`` and the epoch alone, so two integers resume it."""

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        if not items:
            raise ValueError("a prompt stream needs at least one item")
        self.items, self.seed = items, seed
        self.epoch, self.cursor = 0, 0
        self.order = self._shuffled()
        """Indices of the items, as this pass takes them."""

    def take(self, count: int) -> list[Item]:
        """The next ``count`` items; a new shuffle begins when a pass is used up."""
        taken = []
        while len(taken) < count:
            if self.cursor == len(self.items):
                self.epoch, self.cursor = self.epoch + 1, 0
                self.order = self._shuffled()
            taken.append(self.items[self.order[self.cursor]])
            self.cursor += 1
        return taken

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor, "items": len(self.items)}

    def restore(self, state: Mapping[str, int]) -> None:
        if state["items"] != len(self.items):
            raise ValueError(
                f"the run learned from {state['items']} rows, now there are {len(self.items)}: resume it with the same data, "
                "prompt lengths and evaluation.prompts"
            )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.items))
