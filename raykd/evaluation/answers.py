"""Answers that can be right or wrong: BLEU against translations, equality with a number."""

from collections.abc import Sequence
from typing import Any

import sacrebleu
from math_verify import ExprExtractionConfig, parse, verify


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU with sacrebleu's defaults (Post, WMT 2018); rows may have different numbers of references; [0, 100]."""
    most = max(map(len, references))
    # sacrebleu wants one list for each position of a reference, None where a row has fewer (its types do not say so).
    streams: Any = [[row[index] if index < len(row) else None for row in references] for index in range(most)]
    return sacrebleu.corpus_bleu(list(texts), streams).score


def same_number(text: str, answer: str) -> bool:
    """Whether the last result in ``text``, a worked solution, equals ``answer``: 18, 18.0 and \\frac{36}{2} are the same.

    Parsing and comparison are math-verify's, each within five seconds; call it from the main thread, where its clock runs.
    """
    return verify(parse(answer, [ExprExtractionConfig()]), parse(text))
