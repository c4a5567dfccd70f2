"""Rouge-L as MiniLLM reports it (arXiv 2306.08543, section 3.1), by the ``rouge-score`` package."""

from collections.abc import Sequence
from functools import cache
from statistics import fmean

from rouge_score.rouge_scorer import RougeScorer

BUCKETS = {"0-5": range(6), "6-10": range(6, 11), "11+": range(11, 1 << 62)}
"""MiniLLM's ranges of the reference's length."""


def rouge_l(text: str, references: Sequence[str]) -> float:
    """100 * max_r F(text, r), F the F-measure of the longest common subsequence of stemmed words; within [0, 100]."""
    return 100 * _scorer().score_multi(references, text)["rougeL"].fmeasure


def by_length(values: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """The mean value in each range of reference lengths, in tokens; ranges without a row are left out."""
    groups = {
        name: [value for value, length in zip(values, lengths, strict=True) if length in bucket]
        for name, bucket in BUCKETS.items()
    }
    return {name: fmean(group) for name, group in groups.items() if group}


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
