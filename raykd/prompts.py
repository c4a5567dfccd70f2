"""Rows -> tokenised prompts, once. Everything after this file carries ids.

tokenise, tokenise_documents -> list[Prompt]
pack_text                    -> chunks of plain text for a language-modelling loss
PromptStream                 -> a shuffled, endless, resumable stream over a list
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from raykd.records import Prompt
from raykd.sources import Conversations, Documents, Pairs, Row, conversation, document, pair

Encode = Callable[[str], tuple[int, ...]]


def tokenise(
    rows: Iterable[Row],
    source: Pairs | Conversations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt: int,
    max_response: int,
    eos_ids: Sequence[int] = (),
) -> list[Prompt]:
    """Prompts of at most ``max_prompt`` tokens (longer ones are left out), answers cut at ``max_response``.

    A response is tokenised as the continuation of its prompt, so that a student sees in training the ids it would itself
    produce after that prompt, and ends where the student would: at the first of ``eos_ids``, by default the tokenizer's EOS.
    Raises ValueError naming the row when a field is missing or nothing is left.
    """
    encode = partial(_encode if source.chat is None else _encode_as_it_stands, tokenizer)
    prompts = []
    for index, row in enumerate(rows):
        prompt, answer = _texts(source, row, index, tokenizer)
        ids = encode(prompt)
        if not 0 < len(ids) <= max_prompt:
            continue
        response, finished = (), True
        if answer is not None:
            response, finished = _cut(_continuation(encode, tokenizer, prompt, ids, answer), tokenizer, eos_ids, max_response)
        prompts.append(Prompt(id=f"{Path(source.path).name}:{index}", tokens=ids, response=response, finished=finished))
    if not prompts:
        raise ValueError(f"data set {source.path}: no prompt has at most max_prompt={max_prompt} tokens; raise max_prompt")
    return prompts


def tokenise_documents(
    rows: Iterable[Row],
    source: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_response: int,
    eos_ids: Sequence[int] = (),
) -> list[Prompt]:
    """Each document split at ``prompt_tokens``: prompt and reference continuation. Documents no longer than that are left out."""
    prompts = []
    for index, row in enumerate(rows):
        ids = _encode(tokenizer, document(source, row, index))
        if len(ids) <= source.prompt_tokens:
            continue
        response, finished = _cut(ids[source.prompt_tokens :], tokenizer, eos_ids, max_response)
        name = f"{Path(source.path).name}:{index}"
        prompts.append(Prompt(id=name, tokens=ids[: source.prompt_tokens], response=response, finished=finished))
    if not prompts:
        raise ValueError(f"data set {source.path}: no document has more than prompt_tokens={source.prompt_tokens} tokens")
    return prompts


def pack_text(rows: Iterable[Row], source: Documents, tokenizer: PreTrainedTokenizerBase, *, length: int) -> list[Prompt]:
    """Documents joined with EOS and cut into chunks of ``length`` tokens: the first token is the prompt, the rest is to be
    predicted. The last, shorter chunk is dropped."""
    ids: list[int] = []
    for index, row in enumerate(rows):
        ids += [*_encode(tokenizer, document(source, row, index)), eos_id(tokenizer)]
    chunks = [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    if not chunks:
        raise ValueError(f"plain text {source.path} has {len(ids)} tokens, fewer than one chunk of {length}; bring more text")
    name = Path(source.path).name
    return [Prompt(id=f"{name}:chunk{i}", tokens=chunk[:1], response=chunk[1:], finished=False) for i, chunk in enumerate(chunks)]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response; raises ValueError when the tokenizer has none."""
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise ValueError(f"tokenizer {tokenizer.name_or_path} has no EOS token: a response could never end; set eos_token")
    return token_id


Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class Data:
    """What a run learns from and is measured on: tokenised once, before anything starts."""

    prompts: "PromptStream[Prompt]"
    held_out: Sequence[Prompt]
    decode: Callable[[Sequence[int]], str]
    text: "PromptStream[Prompt] | None"
    left_out: str = ""
    """A sentence on the rows that nothing is learned from, if there are any."""


class PromptStream(Generic[Item]):
    """Endless shuffled passes over a list; the order depends on ``seed`` and the epoch alone, so two integers resume it."""

    def __init__(self, items: list[Item], seed: int) -> None:
        if not items:
            raise ValueError("a prompt stream needs at least one item")
        self.items, self.seed = items, seed
        self.epoch, self.cursor = 0, 0
        self._order = self._shuffled()

    def take(self, count: int) -> list[Item]:
        """The next ``count`` items; a new shuffle begins when a pass is used up."""
        taken = []
        while len(taken) < count:
            if self.cursor == len(self.items):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._shuffled()
            taken.append(self.items[self._order[self.cursor]])
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
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.items))


def _texts(source: Pairs | Conversations, row: Row, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Prompt and response of a row, laid out where they are a chat."""
    if isinstance(source, Conversations):
        chat, (messages, answer) = source.chat, conversation(source, row, index)
    else:
        prompt, answer = pair(source, row, index)
        chat, messages = source.chat, [{"role": "user", "content": prompt}]
        if chat is None:
            return prompt, answer
    try:
        return chat.lay_out(tokenizer, messages, answer)
    except ValueError as error:
        raise ValueError(f"{source.path}, row {index + 1}: {error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids as at the start of a sequence, without the EOS that some tokenizers append, and with one BOS where the text brings its
    own."""
    ids = tokenizer(text)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2 and text.startswith(str(tokenizer.bos_token)):
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return tuple(ids)


def _encode_as_it_stands(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text that has all its special tokens, as a chat template writes them."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation(
    encode: Encode, tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: tuple[int, ...], answer: str
) -> tuple[int, ...]:
    whole = encode(prompt + answer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    # A token would span the boundary; at generation the prompt stands alone, so the answer starts a new token.
    return _encode_as_it_stands(tokenizer, answer)


def _cut(
    ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], max_response: int
) -> tuple[tuple[int, ...], bool]:
    """Up to the first of ``eos_ids``, by default the tokenizer's EOS; where there is none, the first of them is added."""
    ends = eos_ids or (eos_id(tokenizer),)
    length = next((place for place, token in enumerate(ids, 1) if token in ends), None)
    whole = ids[:length] if length else (*ids, ends[0])
    return whole[:max_response], len(whole) <= max_response
