"""Supervised fine-tuning on the data set's responses, or on the teacher's."""

from typing import Literal

from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress, Reduction, reduce_tokens
from raykd.logprobs import gather
from raykd.records import Batch


class NegativeLogLikelihood(Algorithm):
    """L = -sum_t log q(y_t | x, y_<t), reduced over the tokens of the step."""

    reduction: Reduction = "token_mean"

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor) -> PerToken:
        return {"nll": -gather(student, tokens)}

    def loss(self, per_token: PerToken, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = reduce_tokens(per_token["nll"], batch, self.reduction)
        return loss, {"nll": reduce_tokens(per_token["nll"].detach(), batch, "token_mean")}


class SFT(NegativeLogLikelihood):
    """Supervised fine-tuning: L = -sum_t log q(y_t | x, y_<t) on the data set's own responses; no teacher."""

    kind: Literal["sft"] = "sft"

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(dataset=1.0)


class SeqKD(NegativeLogLikelihood):
    """Sequence-level distillation: L = -sum_t log q(y_t | x, y_<t), y ~ p(. | x); Kim and Rush, arXiv 1606.07947.

    The responses are sampled from the teacher (teacher share 1) instead of searched for by a beam. Its log-probs, which are the
    sampling law's, enter no loss: they make log p - log q an estimate of the sequence-level forward KL.
    """

    kind: Literal["seq_kd"] = "seq_kd"

    @property
    def needs(self) -> Needs:
        return Needs.SAMPLED

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(student=1.0, teacher_share=1.0)

    def loss(self, per_token: PerToken, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(per_token, batch)
        sampled = batch.teacher_logprobs + per_token["nll"].detach()
        return loss, metrics | {"sampled_forward_kl": reduce_tokens(sampled, batch, "token_mean")}
