"""A language that every machine can write and check: dates, said in English.

    1987-11-03   ->   the third of November, nineteen eighty-seven

Every date has several right answers, each as likely as the others: a model must learn a distribution, not a line. And every
answer can be checked.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)


@dataclass(frozen=True)
class Folder:
    """Where the language was written."""

    pairs: Path
    """JSONL rows with ``prompt`` and ``response``."""
    noisy: Path
    """The same, but some answers belong to another date."""
    texts: Path
    """JSONL rows with ``text``."""
    tokenizer: Path


def write(folder: Path, rows: int, wrong: float = 0.3, seed: int = 0) -> Folder:
    """Pairs, the same with a share ``wrong`` of answers mixed up, plain text, and a tokenizer that reads digit by digit."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Folder(folder / "pairs.jsonl", folder / "noisy.jsonl", folder / "texts.jsonl", folder / "tokenizer")
    pairs, others = list(sample(rows, seed)), list(sample(rows, seed + 1))
    draw = random.Random(seed)
    noisy = [(p, other if draw.random() < wrong else r) for (p, r), (_, other) in zip(pairs, others, strict=True)]
    for path, answered in ((written.pairs, pairs), (written.noisy, noisy)):
        path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in answered), encoding="utf-8")
    written.texts.write_text("".join(json.dumps({"text": p + r}) + "\n" for p, r in others), encoding="utf-8")
    tokenizer([p + r for p, r in pairs]).save_pretrained(written.tokenizer)
    return written


def sample(rows: int, seed: int) -> Iterator[tuple[str, str]]:
    """Dates and one of the right answers to each, both at random."""
    draw = random.Random(seed)
    for _ in range(rows):
        day = date.fromordinal(draw.randint(FIRST.toordinal(), LAST.toordinal()))
        yield f"{day.isoformat()}\n", draw.choice(answers(day))


def is_right(prompt: str, response: str) -> bool:
    """Whether a response is one of the right answers."""
    return response in answers(date.fromisoformat(prompt.strip()))


def answers(day: date) -> list[str]:
    """Every right way to say it."""
    said, month = ordinal(day.day), f"{day:%B}"
    days = (f"the {said} of {month}", f"{month} the {said}")
    years = (str(day.year), f"{number(day.year // 100)} {two_digits(day.year % 100)}")
    return [form for day, year in product(days, years) for form in (f"{day}, {year}", f"in {year}, on {day}")]


def number(value: int) -> str:
    """0 to 99 in words."""
    if value < 20:
        return ONES[value]
    tens = TENS[value // 10 - 2]
    return tens if value % 10 == 0 else f"{tens}-{ONES[value % 10]}"


def two_digits(value: int) -> str:
    """The second half of a year: hundred, oh five, forty-two."""
    if value == 0:
        return "hundred"
    return f"oh {ONES[value]}" if value < 10 else number(value)


def ordinal(value: int) -> str:
    """1 to 31 as an ordinal."""
    head, hyphen, last = number(value).rpartition("-")
    return head + hyphen + IRREGULAR.get(last, f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")


def tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit stands alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)
