"""A language that every machine can write and check: dates and times, said in English.

    1987-11-03 08:45 AM   ->   a quarter to nine in the morning on the third of November, nineteen eighty-seven

Every moment has several right answers, each as likely as the others: a model must learn a distribution, not a line. And every
answer can be checked.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
FIRST, LAST = datetime(1900, 1, 1), datetime(2099, 12, 31)


@dataclass(frozen=True)
class Folder:
    """Where the language was written."""

    pairs: Path
    """JSONL rows with ``prompt`` and ``response``."""
    texts: Path
    """JSONL rows with ``text``."""
    tokenizer: Path


def write(folder: Path, rows: int, seed: int = 0) -> Folder:
    """Question/answer pairs, the same language as plain text, and a tokenizer that reads digit by digit."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Folder(folder / "pairs.jsonl", folder / "texts.jsonl", folder / "tokenizer")
    pairs, more = list(sample(rows, seed)), list(sample(rows, seed + 1))
    written.pairs.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs), encoding="utf-8")
    written.texts.write_text("".join(json.dumps({"text": p + r}) + "\n" for p, r in more), encoding="utf-8")
    tokenizer([p + r for p, r in pairs]).save_pretrained(written.tokenizer)
    return written


def sample(rows: int, seed: int) -> Iterator[tuple[str, str]]:
    """Moments and one of the right answers to each, both at random."""
    draw = random.Random(seed)
    minutes = int((LAST - FIRST) / timedelta(minutes=1))
    for _ in range(rows):
        moment = FIRST + timedelta(minutes=draw.randrange(minutes))
        yield f"{moment:%Y-%m-%d %I:%M %p}\n", draw.choice(answers(moment))


def is_right(prompt: str, response: str) -> bool:
    """Whether a response is one of the right answers."""
    return response in answers(datetime.strptime(prompt.strip(), "%Y-%m-%d %I:%M %p"))


def answers(moment: datetime) -> list[str]:
    """Every right way to say it."""
    day = ordinal(moment.day)
    dates = (f"the {day} of {moment:%B}", f"{moment:%B} the {day}")
    years = (f"{moment.year}", f"{number(moment.year // 100)} {two_digits(moment.year % 100)}")
    part = next(part for hour, part in ((5, "at night"), (12, "in the morning"), (18, "in the afternoon"), (22, "in the evening"), (24, "at night")) if moment.hour < hour)
    said = []
    for time, date, year in product(times(moment.hour, moment.minute), dates, years):
        said += [f"{time} {part} on {date}, {year}", f"on {date}, {year}, {time} {part}"]
    return said


def times(hour: int, minute: int) -> tuple[str, ...]:
    """The time of day as one reads it from hands, and from digits."""
    this, following = number((hour - 1) % 12 + 1), number(hour % 12 + 1)
    digits = f"{this} {two_digits(minute)}"
    if minute == 0:
        return (f"{this} o'clock",)
    if minute == 30:
        return f"half past {this}", digits
    spoken = "a quarter" if minute in (15, 45) else number(min(minute, 60 - minute))
    return f"{spoken} past {this}" if minute < 30 else f"{spoken} to {following}", digits


def number(value: int) -> str:
    """0 to 99 in words."""
    if value < 20:
        return ONES[value]
    tens = TENS[value // 10 - 2]
    return tens if value % 10 == 0 else f"{tens}-{ONES[value % 10]}"


def two_digits(value: int) -> str:
    """The second half of a year or the minutes: hundred, oh five, forty-two."""
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
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)
