"""Where rows come from, and what of them is prompt and response.

read_rows(source) -> rows (dicts), from a file, a folder or the Hub
Pairs, Conversations, Documents: what a row is
"""

from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from pydantic import Field, field_validator

from raykd.chat import Chat, Message
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

Row = Mapping[str, Any]


class Rows(Protocol):
    """Rows of a data set, each read when it is asked for; a list of them will do, too."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Row]: ...
    def __getitem__(self, index: int, /) -> Row: ...


LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""File suffix (a final ``.gz`` set aside) -> loader of the datasets library."""


class DataSource(Value):
    """Where rows come from."""

    path: str
    """A file (.parquet, or .jsonl, .json, .csv, .txt, each also .gz), or the name of a data set on the Hugging Face Hub."""
    split: str = "train"
    """Which split of a data set, or which part of one: "train[500:]". All of a file is "train"."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""

    @property
    def no_answers(self) -> str | None:
        """Why rows have no reference answers, and what gives them some; None where they have."""
        return None


class Pairs(DataSource):
    """Rows with a prompt and, where an algorithm learns from data, a response."""

    prompt: str = "{prompt}"
    """Template over the row's fields."""
    prompt_without_input: str | None = None
    """Template for rows in which a field is empty that ``prompt`` names and this one does not."""
    response: str | None = "{response}"
    """Template of the reference answer; None when the data has none."""
    chat: Chat | None = None
    """The prompt is a user's message and the response the assistant's; None: they go to the tokenizer as they are."""

    @property
    def no_answers(self) -> str | None:
        return "response is not set; give a template, e.g. '{answer}'" if self.response is None else None

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


class Conversations(DataSource):
    """Rows with a list of messages, each with a ``role`` and a ``content``: the assistant's last one is the response, what stands
    before it the prompt."""

    field: str = "messages"
    answers: bool = True
    """Whether they end with an answer to learn from; False: none is needed, and one that stands there is left out."""
    chat: Chat = Chat()

    @property
    def no_answers(self) -> str | None:
        return None if self.answers else "answers is False; set it to True"


class Documents(DataSource):
    """Plain text: the first tokens of a document are the prompt, what follows is its reference continuation."""

    field: str = "text"
    prompt_tokens: int = Field(default=16, ge=1)


def read_rows(source: DataSource) -> Rows:
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
    rows = data.select(range(min(len(data), source.limit or len(data))))
    if not len(rows):
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


def _fields(template: str) -> set[str]:
    """Their names; ValueError for what is no template."""
    return {field for _, field, _, _ in Formatter().parse(template) if field}


def pair(source: Pairs, row: Row, index: int) -> tuple[str, str | None]:
    """Prompt and response of a row, as its templates write them."""
    prompt = _render(_template(source, row), row, source.path, index)
    return prompt, None if source.response is None else _render(source.response, row, source.path, index)


def document(source: Documents, row: Row, index: int) -> str:
    """The text of a row."""
    return _render(f"{{{source.field}}}", row, source.path, index)


def conversation(source: Conversations, row: Row, index: int) -> tuple[list[Message], str | None]:
    """What stands before the answer, and the answer."""
    where, messages = f"{source.path}, row {index + 1}: field {source.field!r}", row.get(source.field)
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(f"{where} is no list of messages with a role and a content, both text; name the right field")
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise ValueError(f"{where} has no message that asks for an answer; mend the row")
    if not source.answers:
        return asked, None
    if asked is messages:
        raise ValueError(
            f"{where} ends with a message of {messages[-1]['role']}, not with an answer of assistant to learn from; mend the "
            "row, or set answers to False"
        )
    return asked, messages[-1]["content"]


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(part), str) for part in ("role", "content"))


def _template(source: Pairs, row: Row) -> str:
    if source.prompt_without_input is not None:
        optional = _fields(source.prompt) - _fields(source.prompt_without_input)
        if any(row.get(field) in (None, "") for field in optional):
            return source.prompt_without_input
    return source.prompt


def _render(template: str, row: Row, path: str, index: int) -> str:
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
                "for each text that the templates name, or take Conversations for lists of messages"
            )
    return template.format_map(row)
