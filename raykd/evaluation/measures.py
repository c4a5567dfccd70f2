"""The measures of one suite's answers, text and tokens in, numbers out."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from raykd.evaluation.answers import bleu, same_number
from raykd.evaluation.diversity import distinct_n, self_bleu
from raykd.evaluation.results import Measured
from raykd.evaluation.rouge import by_length, rouge_l
from raykd.evaluation.suites import Metric, Question, Suite
from raykd.records import Rollout


def on_answers(
    suite: Suite,
    asked: Sequence[Question],
    rollouts: Sequence[Sequence[Rollout]],
    texts: Sequence[Sequence[str]],
    teachers: Sequence[Sequence[str]] | None = None,
) -> dict[str, Measured]:
    """Every measure of a suite that needs nothing but the answers; the outer sequences are seeds, the inner ones rows.

    ``teachers`` holds the teacher's texts: Rouge-L to them, too, seed by seed.
    """
    measured = _over_seeds(
        [on_texts(suite, asked, seed) | on_tokens(tokens) for seed, tokens in zip(texts, rollouts, strict=True)]
    )
    if teachers is not None:
        pairs = [zip(own, other, strict=True) for own, other in zip(texts, teachers, strict=True)]
        measured["rouge_l_to_teacher"] = Measured(values=tuple(fmean(rouge_l(a, [b]) for a, b in seed) for seed in pairs))
    if len(texts) > 1:
        measured["self_bleu"] = Measured(values=(self_bleu(list(zip(*texts, strict=True))),))
    return measured


def on_texts(suite: Suite, asked: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """One seed: Rouge-L, also by the length of the reference, and the suite's own metric."""
    scores = [rouge_l(text, question.references) for text, question in zip(texts, asked, strict=True)]
    buckets = by_length(scores, [question.reference_length for question in asked])
    measures = {"rouge_l": fmean(scores)} | {f"rouge_l/{bucket}": value for bucket, value in buckets.items()}
    if suite.metric is Metric.BLEU:
        measures["bleu"] = bleu(texts, [question.references for question in asked])
    elif suite.metric is Metric.EXACT_MATCH:
        right = [same_number(text, question.references[0]) for text, question in zip(texts, asked, strict=True)]
        measures["exact_match"] = 100 * fmean(right)
    return measures


def on_tokens(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """One seed: length in tokens, percent cut by the limit, percent of different 4-grams."""
    return {
        "length": fmean(len(rollout.tokens) for rollout in rollouts),
        "cut": 100 * fmean(not rollout.finished for rollout in rollouts),
        "distinct_4": distinct_n([rollout.tokens for rollout in rollouts]),
    }


def _over_seeds(seeds: Sequence[Mapping[str, float]]) -> dict[str, Measured]:
    return {name: Measured(values=tuple(seed[name] for seed in seeds)) for name in seeds[0]}
