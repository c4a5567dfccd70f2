"""What models find likely: test loss, exact KL to a teacher a chunk of positions at a time, and label words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from raykd.algorithms.base import Needs
from raykd.divergences import forward_kl, reverse_kl
from raykd.evaluation.calibration import accuracy, expected_calibration_error
from raykd.evaluation.exposure_bias import excess_error
from raykd.evaluation.suites import LabelQuestion
from raykd.experiment import TeacherConfig
from raykd.logprobs import log_softmax
from raykd.records import Prompt, Rollout, Scores
from raykd.teacher import Teacher

BLOCK = 64
"""Responses whose hidden states are held at the same time."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The responses of one suite that are scored."""

    references: list[Rollout]
    own: list[list[Rollout]]
    """Written by the model, seed by seed."""
    teachers: list[list[Rollout]]
    """Written by the teacher, seed by seed."""


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """What ``score`` finds on one suite."""

    measures: dict[str, tuple[float, ...]]
    """A value for each seed, or a single one where no seed matters."""
    excess_error: tuple[float, ...] = ()
    """ExAccErr(l), l = 1, 2, ..., of the answers of all seeds."""


class Scorer:
    """A frozen model: log-probs of given tokens, and its distribution from its hidden states."""

    def __init__(self, model: str, config: TeacherConfig, vocab_size: int) -> None:
        self._model = Teacher(model, config.model_copy(update={"payload": "hidden"}), vocab_size=vocab_size)
        head, device = self._model.head(), self._model.device
        self._head = replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
        self.device, self.chunk = device, config.chunk

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """log p of every response's tokens; [T] each."""
        return [row for block in _blocks(rollouts) for row in self._model.score(block, Needs.SAMPLED).logprobs_by_rollout()]

    def hidden(self, rollouts: Sequence[Rollout]) -> Scores:
        return self._model.score(rollouts, Needs.DISTRIBUTION)

    def distribution(self, hidden: Tensor) -> Tensor:
        """log-probs over the true vocabulary; ``[n, H] -> [n, V]``."""
        return log_softmax(self._head(hidden.to(self.device)))


def score(
    model: str,
    teacher: str | None,
    config: TeacherConfig,
    vocab_size: int,
    texts: Mapping[str, Texts],
    labelled: Mapping[str, Sequence[LabelQuestion]],
) -> dict[str, Likelihoods]:
    """For each suite the test loss; with a teacher also forward KL on the references and reverse KL on the model's own answers,
    both per token, and ExAccErr, seed by seed; for label suites accuracy and calibration."""
    student = Scorer(model, config, vocab_size)
    guide = None if teacher is None else Scorer(teacher, config, vocab_size)
    found = {name: _on_texts(student, guide, suite) for name, suite in texts.items()}
    return found | {name: _on_labels(student, asked) for name, asked in labelled.items()}


@torch.inference_mode()
def kl_per_token(student: Scorer, teacher: Scorer, rollouts: Sequence[Rollout]) -> tuple[list[Tensor], list[Tensor]]:
    """KL(p || q) and KL(q || p), p the teacher, q the student, at every token of each response: two lists of [T]."""
    forward, reverse = [], []
    for block in _blocks(rollouts):
        of_student, of_teacher = student.hidden(block), teacher.hidden(block)
        assert of_student.hidden is not None and of_teacher.hidden is not None
        chunks = zip(of_student.hidden.split(student.chunk), of_teacher.hidden.split(student.chunk), strict=True)
        pairs = [_both(student.distribution(q), teacher.distribution(p).to(student.device)) for q, p in chunks]
        lengths = [len(rollout.tokens) for rollout in block]
        for kept, values in zip((forward, reverse), zip(*pairs, strict=True), strict=True):
            kept += torch.cat(values).split(lengths)
    return forward, reverse


def _on_texts(student: Scorer, teacher: Scorer | None, texts: Texts) -> Likelihoods:
    test_loss = (-token_mean(student.logprobs(texts.references)),)
    if teacher is None:
        return Likelihoods({"test_loss": test_loss})
    forward, _ = kl_per_token(student, teacher, texts.references)
    on_own, reverse = zip(*(kl_per_token(student, teacher, seed) for seed in texts.own), strict=True)
    on_teachers = [kl_per_token(student, teacher, seed)[0] for seed in texts.teachers]
    at_the_end = (excess_error(*pair)[-1] for pair in zip(on_own, on_teachers, strict=True))
    measures = {
        "test_loss": test_loss,
        "forward_kl": (token_mean(forward),),
        "reverse_kl": tuple(map(token_mean, reverse)),
        "excess_error": tuple(map(float, at_the_end)),
    }
    together = excess_error(list(chain.from_iterable(on_own)), list(chain.from_iterable(on_teachers)))
    return Likelihoods(measures, tuple(together.tolist()))


def _on_labels(model: Scorer, asked: Sequence[LabelQuestion]) -> Likelihoods:
    probabilities, labels = label_probabilities(model, asked), torch.tensor([question.label for question in asked])
    ece = expected_calibration_error(probabilities, labels)
    return Likelihoods({"accuracy": (100 * accuracy(probabilities, labels),), "ece": (ece,)})


def label_probabilities(model: Scorer, asked: Sequence[LabelQuestion]) -> Tensor:
    """P(word | prompt) among the words of each question, by the likelihood of the words' tokens; [N, C]."""
    words = [
        Rollout.reference(replace(prompt, response=_without_eos(prompt))) for question in asked for prompt in question.prompts
    ]
    likelihoods = torch.stack([logprobs.double().sum() for logprobs in model.logprobs(words)])
    return likelihoods.view(len(asked), -1).softmax(-1)


def token_mean(values: Sequence[Tensor]) -> float:
    """Over all tokens of all responses."""
    return float(torch.cat(list(values)).double().mean())


def _both(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return forward_kl(student, teacher).cpu(), reverse_kl(student, teacher).cpu()


def _without_eos(prompt: Prompt) -> tuple[int, ...]:
    return prompt.response[:-1] if prompt.finished else prompt.response


def _blocks(rollouts: Sequence[Rollout]) -> Iterator[Sequence[Rollout]]:
    for start in range(0, len(rollouts), BLOCK):
        yield rollouts[start : start + BLOCK]
