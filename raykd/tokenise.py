"""Rows -> tokenised prompts, once. Everything after this file carries ids.

tokenise, tokenise_documents -> Prompts
pack_text                    -> chunks of plain text for a language-modelling loss, as Prompts
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from raykd.prompts import Prompts
from raykd.sources import Conversations, Documents, Pairs, Row, conversation, document, pair

Encode = Callable[[Sequence[str]], list[list[int]]]
Tokenised = tuple[int, list[int], list[int], bool]
"""Row, prompt, response, whether it is finished."""
TOGETHER = 1000
"""Texts that are handed to the tokenizer at once, which has a thread for each core."""


def tokenise(
    rows: Iterable[Row],
    source: Pairs | Conversations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt: int,
    max_response: int,
    eos_ids: Sequence[int] = (),
) -> Prompts:
    """Prompts of at most ``max_prompt`` tokens (longer ones are left out), answers cut at ``max_response``.

    A response is tokenised as the continuation of its prompt, so that a student sees in training the ids it would itself
    produce after that prompt, and ends where the student would: at the first of ``eos_ids``, by default the tokenizer's EOS.
    Raises ValueError naming the row when a field is missing or nothing is left.
    """
    encode = partial(_encode if source.chat is None else _encode_as_it_stands, tokenizer)

    def tokenised() -> Iterator[Tokenised]:
        for some in _slices(rows):
            pairs = [(index, *_texts(source, row, index, tokenizer)) for index, row in some]
            encoded = zip(pairs, encode([prompt for _, prompt, _ in pairs]), strict=True)
            kept = [(*pair, ids) for pair, ids in encoded if 0 < len(ids) <= max_prompt]
            answered = [(text, ids, answer) for _, text, answer, ids in kept if answer is not None]
            responses = iter(_continuations(encode, tokenizer, answered))
            for index, _, answer, ids in kept:
                response, finished = ([], True) if answer is None else _cut(next(responses), tokenizer, eos_ids, max_response)
                yield index, ids, response, finished

    prompts = Prompts.collect(f"{Path(source.path).name}:", tokenised())
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
) -> Prompts:
    """Each document split at ``prompt_tokens``: prompt and reference continuation. Documents no longer than that are left out."""
    split = source.prompt_tokens
    prompts = Prompts.collect(
        f"{Path(source.path).name}:",
        (
            (index, ids[:split], *_cut(ids[split:], tokenizer, eos_ids, max_response))
            for index, ids in _documents(rows, source, tokenizer)
            if len(ids) > split
        ),
    )
    if not prompts:
        raise ValueError(f"data set {source.path}: no document has more than prompt_tokens={split} tokens")
    return prompts


def pack_text(rows: Iterable[Row], source: Documents, tokenizer: PreTrainedTokenizerBase, *, length: int) -> Prompts:
    """Documents joined with EOS and cut into chunks of ``length`` tokens, of which the first is the prompt and the rest is to be
    predicted. The last, shorter chunk is dropped."""
    end, tokens = eos_id(tokenizer), array("i")
    for _, ids in _documents(rows, source, tokenizer):
        tokens.extend(ids)
        tokens.append(end)
    chunks = np.arange(len(tokens) // length)
    if not len(chunks):
        raise ValueError(f"plain text {source.path} has {len(tokens)} tokens, fewer than one chunk of {length}; bring more text")
    places = [chunks, chunks * length, np.full_like(chunks, 1), np.full_like(chunks, length - 1), np.zeros_like(chunks)]
    return Prompts(f"{Path(source.path).name}:chunk", np.asarray(tokens), np.stack(places, axis=1))


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response; raises ValueError when the tokenizer has none."""
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise ValueError(f"tokenizer {tokenizer.name_or_path} has no EOS token: a response could never end; set eos_token")
    return token_id


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


def _slices(rows: Iterable[Row]) -> Iterator[list[tuple[int, Row]]]:
    """Numbered from 0."""
    numbered = enumerate(rows)
    while some := list(islice(numbered, TOGETHER)):
        yield some


def _documents(rows: Iterable[Row], source: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, list[int]]]:
    """The ids of each row's text, with the row's number."""
    for some in _slices(rows):
        texts = [document(source, row, index) for index, row in some]
        yield from zip((index for index, _ in some), _encode(tokenizer, texts), strict=True)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids as at the start of a sequence, without the EOS that some tokenizers append, and with one BOS where a text brings its
    own."""
    if not texts:
        return []
    encoded = []
    for text, ids in zip(texts, tokenizer(list(texts), verbose=False)["input_ids"], strict=True):
        twice = ids[:2] == [tokenizer.bos_token_id] * 2 and text.startswith(str(tokenizer.bos_token))
        ended = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
        encoded.append(ids[int(twice) : len(ids) - bool(ended)])
    return encoded


def _encode_as_it_stands(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that have all their special tokens, as a chat template writes them."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _continuations(
    encode: Encode, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, list[int], str]]
) -> list[list[int]]:
    """Ids of the answers to (prompt, its ids, answer)."""
    wholes = encode([prompt + answer for prompt, _, answer in pairs])
    goes_on = [whole[: len(ids)] == ids for (_, ids, _), whole in zip(pairs, wholes, strict=True)]
    # A token would span the boundary; at generation the prompt stands alone, so the answer starts a new token.
    others = [answer for (_, _, answer), continues in zip(pairs, goes_on, strict=True) if not continues]
    alone = iter(_encode_as_it_stands(tokenizer, others))
    return [
        whole[len(ids) :] if continues else next(alone)
        for (_, ids, _), whole, continues in zip(pairs, wholes, goes_on, strict=True)
    ]


def _cut(ids: list[int], tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], max_response: int) -> tuple[list[int], bool]:
    """Up to the first of ``eos_ids``, by default the tokenizer's EOS; where there is none, the first of them is added."""
    ends = eos_ids or (eos_id(tokenizer),)
    length = next((place for place, token in enumerate(ids, 1) if token in ends), None)
    whole = ids[:length] if length else [*ids, ends[0]]
    return whole[:max_response], len(whole) <= max_response
