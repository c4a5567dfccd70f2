"""The experiments' own text for tests: docstrings of the standard library and their tokenizer, made once a session."""

import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import standard_library  # noqa: E402


@dataclass(frozen=True)
class Text:
    pairs: Path
    """JSONL rows with ``prompt`` and ``response``."""
    texts: Path
    """JSONL rows with ``text``."""
    tokenizer_path: Path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.tokenizer_path)


@cache
def text() -> Text:
    return Text(*standard_library.write(Path(tempfile.mkdtemp(prefix="raykd-test-")), vocab_size=512, limit=800))
