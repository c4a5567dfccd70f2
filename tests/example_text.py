"""The experiments' own text for tests: dates said in English, and their tokenizer, made once a session."""

from functools import cache

import spoken_dates
from folders import temporary
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@cache
def text() -> spoken_dates.Folder:
    """800 question/answer pairs and as much plain text."""
    return spoken_dates.write(temporary("test"), rows=800)


@cache
def text_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of that text."""
    return AutoTokenizer.from_pretrained(text().tokenizer)
