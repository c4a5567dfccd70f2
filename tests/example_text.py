"""The experiments' own text for tests: dates said in English, and their tokenizer, made once a session."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import spoken_dates
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@cache
def text() -> spoken_dates.Folder:
    """800 question/answer pairs and as much plain text."""
    folder = Path(tempfile.mkdtemp(prefix="raykd-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return spoken_dates.write(folder, rows=800)


@cache
def text_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of that text."""
    return AutoTokenizer.from_pretrained(text().tokenizer)
