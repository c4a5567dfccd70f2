"""Data sets -> tokenised prompts, once. Everything after this file carries ids.

read_rows(source)                    -> rows (dicts), from a file, a folder or the Hub
tokenise_pairs / tokenise_documents  -> list[Prompt]
pack_text                            -> chunks of plain text for a language-modelling loss
PromptStream                         -> a shuffled, endless, resumable stream over a list
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from pathlib import Path
from string import Formatter
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerBase

from raykd.records import Prompt
from raykd.value import Value

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of MiniLLM's evaluation (and of Alpaca before it)."""

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""File suffix (a final ``.gz`` set aside) -> loader of the datasets library."""


class _Source(Value):
    """Where rows come from."""

    path: str
    """A file (.parquet, or .jsonl, .json, .csv, .txt, each also .gz), or the name of a data set on the Hugging Face Hub."""
    split: str = "train"
    """Which split of a data set, or which part of one: "train[500:]". All of a file is "train"."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""


class Pairs(_Source):
    """Rows with a prompt and, where an algorithm learns from data, a response."""

    prompt: str = "{prompt}"
    """Template over the row's fields."""
    prompt_without_input: str | None = None
    """Template for rows in which a field is empty that ``prompt`` names and this one does not."""
    response: str | None = "{response}"
    """Template of the reference answer; None when the data has none."""

    @field_validator("prompt", "prompt_without_input", "response")
    @classmethod
    def _names_a_field(cls, template: str | None) -> str | None:
        if template is not None:
            try:
                fields = _fields(template)
            except ValueError as error:
                raise ValueError(f"{template!r} is no template: {error}; a field is {{name}}, a brace {{{{ or }}}}") from error
            if not fields:
                raise ValueError(f"{template!r} names no field of the rows: write one as {{name}}")
            if parts := sorted(field for field in fields if set(".[") & set(field)):
                raise ValueError(f"{template!r} asks for a part of a field, {{{parts[0]}}}: bring the data with a field for it")
        return template


class Documents(_Source):
    """Plain text: the first tokens of a document are the prompt, what follows is its reference continuation."""

    field: str = "text"
    prompt_tokens: int = Field(default=16, ge=1)


def read_rows(source: _Source) -> list[dict[str, Any]]:
    """The rows of a data source; raises ValueError naming the path when it is missing, unreadable or empty."""
    import datasets  # heavy, and only the driver reads data

    datasets.disable_progress_bars()
    path = Path(source.path).expanduser()
    suffix = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    looks_local = source.path.startswith((".", "/", "~")) or suffix in LOADERS
    if looks_local and not path.exists():
        raise ValueError(f"data file {source.path} does not exist; give the path of a file, or a data set's name on the Hub")
    if path.exists() and path.is_file() and suffix not in LOADERS:
        raise ValueError(
            f"data file {source.path}: cannot read {suffix or 'a file without suffix'}; use one of {', '.join(LOADERS)}"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"data set {source.path} is empty: it has no rows")
    try:
        if path.is_file():
            data = datasets.load_dataset(LOADERS[suffix], data_files=str(path), split=source.split, **_as_text(path, suffix))
        else:
            data = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the library raises many kinds; the user needs the path and the reason
        reason: BaseException = error
        while reason.__cause__:  # "An error occurred while generating the dataset" says nothing
            reason = reason.__cause__
        raise ValueError(f"data set {source.path} (split {source.split}) cannot be read: {reason}") from error
    rows = list(data.select(range(min(len(data), source.limit or len(data)))))
    if not rows:
        raise ValueError(f"data set {source.path} is empty: it has no rows")
    return rows  # pyright: ignore[reportReturnType]  an unformatted data set gives dicts


def _as_text(path: Path, suffix: str) -> dict[str, Any]:
    """Options with which the fields of a CSV file stay what they are: 007, NA and False are text."""
    if suffix != ".csv":
        return {}
    import datasets
    import pandas

    names = pandas.read_csv(path, nrows=0).columns
    return {"features": datasets.Features({name: datasets.Value("string") for name in names}), "na_filter": False}


def tokenise_pairs(
    rows: Iterable[Mapping[str, Any]], source: Pairs, tokenizer: PreTrainedTokenizerBase, *, max_prompt: int, max_response: int
) -> list[Prompt]:
    """Prompts of at most ``max_prompt`` tokens (longer ones are left out), answers cut at ``max_response``.

    A response is tokenised as the continuation of its prompt, so that a student sees in training the ids it would itself
    produce after that prompt. Raises ValueError naming the row when a field is missing or nothing is left.
    """
    prompts = []
    for index, row in enumerate(rows):
        prompt_text = _render(_template(source, row), row, source.path, index)
        prompt_ids = _encode(tokenizer, prompt_text)
        if not 0 < len(prompt_ids) <= max_prompt:
            continue
        response, finished = (), True
        if source.response is not None:
            answer = _render(source.response, row, source.path, index)
            response, finished = _cut(_continuation(tokenizer, prompt_text, prompt_ids, answer), tokenizer, max_response)
        prompts.append(Prompt(id=f"{Path(source.path).name}:{index}", tokens=prompt_ids, response=response, finished=finished))
    if not prompts:
        raise ValueError(f"data set {source.path}: no prompt has at most max_prompt={max_prompt} tokens; raise max_prompt")
    return prompts


def tokenise_documents(
    rows: Iterable[Mapping[str, Any]], source: Documents, tokenizer: PreTrainedTokenizerBase, *, max_response: int
) -> list[Prompt]:
    """Each document split at ``prompt_tokens``: prompt and reference continuation. Documents no longer than that are left out."""
    prompts = []
    for index, row in enumerate(rows):
        ids = _encode(tokenizer, _render(f"{{{source.field}}}", row, source.path, index))
        if len(ids) <= source.prompt_tokens:
            continue
        response, finished = _cut(ids[source.prompt_tokens :], tokenizer, max_response)
        name = f"{Path(source.path).name}:{index}"
        prompts.append(Prompt(id=name, tokens=ids[: source.prompt_tokens], response=response, finished=finished))
    if not prompts:
        raise ValueError(f"data set {source.path}: no document has more than prompt_tokens={source.prompt_tokens} tokens")
    return prompts


def pack_text(
    rows: Iterable[Mapping[str, Any]], source: Documents, tokenizer: PreTrainedTokenizerBase, *, length: int
) -> list[Prompt]:
    """Documents joined with EOS and cut into chunks of ``length`` tokens: the first token is the prompt, the rest is to be
    predicted. The last, shorter chunk is dropped."""
    ids: list[int] = []
    for index, row in enumerate(rows):
        ids += [*_encode(tokenizer, _render(f"{{{source.field}}}", row, source.path, index)), eos_id(tokenizer)]
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


def _fields(template: str) -> set[str]:
    """Their names; ValueError for what is no template."""
    return {field for _, field, _, _ in Formatter().parse(template) if field}


def _template(source: Pairs, row: Mapping[str, Any]) -> str:
    if source.prompt_without_input is not None:
        optional = _fields(source.prompt) - _fields(source.prompt_without_input)
        if any(row.get(field) in (None, "") for field in optional):
            return source.prompt_without_input
    return source.prompt


def _render(template: str, row: Mapping[str, Any], path: str, index: int) -> str:
    for field in sorted(_fields(template)):
        value = row.get(field)
        if value is None:
            filled = sorted(name for name, other in row.items() if other is not None)
            raise ValueError(
                f"{path}, row {index + 1}: no field {field!r} (the row has {', '.join(filled)}); "
                "name the right fields in the data templates, or mend the row"
            )
        if isinstance(value, date | time | timedelta):
            raise ValueError(
                f"{path}, row {index + 1}: field {field!r} was read as a {type(value).__name__}, {value}, since every row of it "
                "looks like one, and would not be written as it stands in the file; bring the data as .csv"
            )
        if isinstance(value, Mapping | list):
            raise ValueError(
                f"{path}, row {index + 1}: field {field!r} is no text but a {type(value).__name__}; bring the data with a field "
                "for each text that the templates name"
            )
    return template.format_map(row)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids as at the start of a sequence, without the EOS that some tokenizers append, and with one BOS where the text brings its
    own."""
    ids = tokenizer(text)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2 and text.startswith(str(tokenizer.bos_token)):
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return tuple(ids)


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
    whole = _encode(tokenizer, prompt + answer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    # A token would span the boundary; at generation the prompt stands alone, so the answer starts a new token.
    return tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])


def _cut(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, max_response: int) -> tuple[tuple[int, ...], bool]:
    end = eos_id(tokenizer)
    whole = ids if ids[-1:] == (end,) else (*ids, end)
    return whole[:max_response], len(whole) <= max_response
