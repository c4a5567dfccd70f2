"""Supervised fine-tuning on the data set's responses, or on the teacher's."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress
from raykd.logprobs import gather
from raykd.records import Batch


class SFT(Algorithm):
    """Supervised fine-tuning: L = -sum_t log q(y_t | x, y_<t) on the data set's own responses; no teacher."""

    kind: Literal["sft"] = "sft"

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(dataset=1.0)

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        nll = -gather(student, tokens)
        return {"loss": nll, "nll": nll.detach()}


class SeqKD(Algorithm):
    """Sequence-level distillation: L = -sum_t log q(y_t | x, y_<t), y ~ p(. | x); Kim and Rush, arXiv 1606.07947.

    The responses are sampled from the teacher instead of searched for by a beam. Its log-probs, which are the sampling law's,
    enter no loss: they make log p - log q an estimate of the sequence-level forward KL.
    """

    kind: Literal["seq_kd"] = "seq_kd"

    @property
    def needs(self) -> Needs:
        return Needs.SAMPLED

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(teacher=1.0)

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        return {"teacher_logprob": batch.teacher_logprobs}

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        nll = -gather(student, tokens)
        return {"loss": nll, "nll": nll.detach(), "sampled_forward_kl": given["teacher_logprob"] + nll.detach()}
