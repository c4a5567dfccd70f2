"""Held-out numbers within a run."""

import time
from collections.abc import Sequence
from statistics import fmean

from raykd.algorithms import GKD, KD, SFT
from raykd.algorithms.base import Needs
from raykd.algorithms.token_divergences import ReverseKL
from raykd.evaluation.diversity import distinct_n
from raykd.evaluation.rouge import rouge_l
from raykd.experiment import Experiment
from raykd.phases import Position
from raykd.prompts import Data
from raykd.records import Rollout, Source
from raykd.tracking import Tracker
from raykd.workers import Term, Workers, unscored


def measure(experiment: Experiment, workers: Workers, data: Data, tracker: Tracker, at: Position) -> dict[str, float]:
    """Per token: cross-entropy and forward KL on the reference answers, reverse KL on the student's own. Of its own answers also
    Rouge-L to the references, and how varied and long they are."""
    if not data.held_out:
        return {}
    started = time.monotonic()
    given = [Rollout.reference(prompt) for prompt in data.held_out if prompt.response]
    metrics: dict[str, float] = {}
    if given:
        metrics["loss"] = workers.evaluate([Term(algorithm=SFT(), rows=unscored(given))])["loss"]
        at.held_out.append(metrics["loss"])
    if given and workers.teachers is not None:
        rows = workers.score(given, Needs.DISTRIBUTION)
        metrics["forward_kl"] = workers.evaluate([Term(algorithm=KD(), rows=rows)])["loss"]
    if workers.rollouts is not None:
        written = workers.generate(
            data.held_out, workers.publish(), samples=1, teacher_share=0.0, max_tokens=experiment.max_response, salt=-1
        )
        workers.sleep()
        if workers.teachers is not None:
            rows = workers.score(written, Needs.DISTRIBUTION)
            metrics["reverse_kl"] = workers.evaluate([Term(algorithm=GKD(divergence=ReverseKL()), rows=rows)])["loss"]
        metrics |= of_answers(data, written)
        keep_samples(experiment, workers, data, tracker, at.total, written)
    tracker.log_held_out(at.total, metrics | {"measuring_seconds": time.monotonic() - started})
    workers.usage.take()  # measuring is not part of any step
    return metrics


def of_answers(data: Data, written: Sequence[Rollout]) -> dict[str, float]:
    """What the held-out answers look like as texts: the measures of ``raykd evaluate``, on one sample each."""
    pairs = [(data.decode(rollout.tokens), data.decode(p.response)) for rollout, p in zip(written, data.held_out, strict=True)]
    compared = [rouge_l(answer, [reference]) for answer, reference in pairs if reference]
    shape = {name: value for name, value in summary(written, 0).items() if name.startswith(("response", "empty", "cut"))}
    rouge = {"rouge_l": fmean(compared)} if compared else {}
    return rouge | {"distinct_4": distinct_n([rollout.tokens for rollout in written])} | shape


def keep_samples(
    experiment: Experiment, workers: Workers, data: Data, tracker: Tracker, step: int, written: Sequence[Rollout]
) -> None:
    """Some held-out prompts as text, with the student's answers and the data set's; before the first step the teacher's, too."""
    shown = data.held_out[: experiment.evaluation.samples]
    samples = [
        {"prompt": data.decode(prompt.tokens), "student": data.decode(rollout.tokens), "reference": data.decode(prompt.response)}
        for prompt, rollout in zip(shown, written, strict=False)
    ]
    if step == 0 and shown and workers.teachers is not None:
        answers = workers.teacher_answers(shown, experiment.max_response)
        samples = [sample | {"teacher": data.decode(tokens)} for sample, tokens in zip(samples, answers, strict=True)]
    tracker.log_samples(step, samples)


def summary(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """What the responses of a batch look like: a falling divergence means little when they grow short or stop ending."""
    count = max(1, len(rollouts))
    return {
        "response_length": sum(len(r.tokens) for r in rollouts) / count,
        "empty_share": sum(len(r.tokens) <= 1 for r in rollouts) / count,
        "cut_share": sum(not r.finished for r in rollouts) / count,
        "dataset_share": sum(r.source is Source.DATASET for r in rollouts) / count,
        "replayed_share": sum(r.source is not Source.DATASET and r.version < version - 1 for r in rollouts) / count,
        "staleness": sum(version - 1 - r.version for r in rollouts if r.source is not Source.DATASET) / count,
    }
