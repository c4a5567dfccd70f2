"""How varied a model's answers are."""

from collections.abc import Sequence
from statistics import fmean

import sacrebleu


def distinct_n(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """100 * different n-grams / n-grams, over all token sequences together; Li et al., NAACL 2016. 0 where there is none.

    MiniLLM's Dist-4. It falls with the number and length of the sequences: compare equal suites and seeds only.
    """
    grams = [tuple(tokens[start : start + n]) for tokens in sequences for start in range(len(tokens) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(groups: Sequence[Sequence[str]]) -> float:
    """The mean BLEU of each answer against the other answers to the same prompt; after Zhu et al., SIGIR 2018. [0, 100].

    ``groups`` holds for every prompt its answers, at least two. 100: all answers are the same. Sentence BLEU is sacrebleu's with
    the effective order, so that answers shorter than four words count.
    """
    if any(len(group) < 2 for group in groups):
        raise ValueError("self_bleu compares answers to the same prompt: it needs at least two of each")
    metric = sacrebleu.BLEU(effective_order=True)
    return fmean(
        metric.sentence_score(text, [*group[:index], *group[index + 1 :]]).score
        for group in groups
        for index, text in enumerate(group)
    )
