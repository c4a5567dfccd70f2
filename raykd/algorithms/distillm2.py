"""DistiLLM-2: each skew KL on the text where it helps, the teacher's and the student's answers to the same prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raykd.algorithms.base import Algorithm, Mixture, Needs, PerToken, Progress, Reduction, Sizes
from raykd.algorithms.gkd import measures
from raykd.divergences import skew_reverse_kl
from raykd.logprobs import masked_sum
from raykd.records import Batch, Row, Source

BY_STUDENT, BY_TEACHER = "student", "teacher"


class DistiLLM2(Algorithm):
    """Contrastive skew KL; Ko et al., arXiv 2503.07067.

        L = 1 / (2 |D|) sum_{x, y_t ~ p, y_s ~ q} [ (1 - beta) SKL(x, y_t; alpha_t) + beta SRKL(x, y_s; alpha_s) ]

    each the mean over the tokens of a response. SKL raises q where the teacher writes, SRKL lowers it where only q does.

    alpha follows a curriculum from the second epoch on: alpha = 1 - (1 - alpha_max) m / gap, within [alpha_min, alpha_max], with
    gap = exp(mean log p) - exp(mean log q) of the response on the teacher's text, its negative on the student's, and m the mean
    gap of that side over the step; log q is recorded when the text is written.

    beta follows ``beta_schedule``. The paper's clip(e / E + tau / T, beta, 1), e the epoch counted from 1 and tau / T the part of
    it that is done, read literally reaches 1, and leaves the teacher's text out, within the first epoch. ``ramp`` is the public
    code's: from beta to (1 + beta) / 2 over the first half of the training.
    """

    kind: Literal["distillm2"] = "distillm2"
    reduction: Reduction = "sequence_mean"
    alpha_max: float = Field(default=0.1, gt=0, lt=1)
    alpha_min: float = Field(default=0.01, gt=0, lt=1)
    alpha_curriculum: bool = True
    beta: float = Field(default=0.5, ge=0, le=1)
    beta_schedule: Literal["paper", "ramp", "constant"] = "paper"
    epochs: int = Field(default=3, ge=1)
    """E: parts into which the steps of the stage are divided."""
    detach_mixture: bool = False
    """Leave the gradient of SRKL's mixture out."""
    loss_scale: float = Field(default=1.0, gt=0)
    responses: int | None = Field(default=None, ge=2)
    """Responses written before learning from them, half by each; the paper writes anew once an epoch. None: every step."""

    @classmethod
    def paper(cls) -> "DistiLLM2":
        """Equation 2 with both schedules: the bare value."""
        return cls()

    @classmethod
    def code(cls) -> "DistiLLM2":
        """The public code as it runs (jongwooko/distillm-2 at fe4cf9b): no schedule, weights 1 and 1, the mixture detached."""
        return cls(alpha_curriculum=False, beta_schedule="constant", detach_mixture=True, loss_scale=4.0)

    @property
    def needs(self) -> Needs:
        return Needs.BOTH

    @property
    def rollouts_per_phase(self) -> int | None:
        return self.responses

    def mixture(self, progress: Progress) -> Mixture:
        return Mixture(student=0.5, teacher=0.5, same_prompts=True)

    def refusal(self, sizes: Sizes) -> str | None:
        if sizes.rows_per_phase // sizes.samples_per_prompt % 2 == 0:
            return None
        return (
            f"has student and teacher answer the same prompts, but half of {sizes.rows_per_phase} responses a phase is no whole "
            f"number of prompts at samples_per_prompt {sizes.samples_per_prompt}; change one of them"
        )

    def beta_at(self, progress: Progress) -> float:
        """The weight of the student's text in this step; the teacher's is 1 - beta."""
        done = progress.step / progress.steps
        if self.beta_schedule == "paper":
            epoch = math.floor(done * self.epochs)
            return min(1.0, max(self.beta, (epoch + 1) / self.epochs + done * self.epochs - epoch))
        if self.beta_schedule == "ramp":
            return self.beta + min(1.0, 2 * done) * (1 - self.beta) / 2
        return self.beta

    def per_step(self, progress: Progress, rows: Sequence[Row]) -> dict[str, float]:
        """beta, whether the curriculum has begun, and the mean gap of each side."""
        gaps: dict[str, list[float]] = {BY_STUDENT: [], BY_TEACHER: []}
        for row in rows:
            own, teachers = (
                math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0
                for logprobs in (row.rollout.student_logprobs, row.teacher_logprobs)
            )
            by_student = row.rollout.source.author is Source.STUDENT
            gaps[BY_STUDENT if by_student else BY_TEACHER].append(own - teachers if by_student else teachers - own)
        started = self.alpha_curriculum and progress.step * self.epochs >= progress.steps
        means = {f"gap/{side}": sum(values) / max(1, len(values)) for side, values in gaps.items()}
        return {"beta": self.beta_at(progress), "alpha_curriculum": float(started), **means}

    def per_sequence(self, batch: Batch) -> dict[str, Tensor]:
        """Every token knows its response's alpha and who wrote it."""
        numbers, count = batch.totals.numbers, batch.mask.sum(-1).clamp(min=1)
        student, teacher = (
            (masked_sum(values, batch.mask, dim=-1) / count).exp() for values in (batch.student_logprobs, batch.teacher_logprobs)
        )
        alpha = torch.full_like(student, self.alpha_max)
        if numbers["alpha_curriculum"]:
            gap = torch.where(batch.by_student, student - teacher, teacher - student)
            mean = torch.where(batch.by_student, numbers[f"gap/{BY_STUDENT}"], numbers[f"gap/{BY_TEACHER}"])
            ratio = torch.where(gap == 0, 1.0, mean / gap)  # equal likelihoods ask for nothing
            alpha = (1 - (1 - self.alpha_max) * ratio).clamp(self.alpha_min, self.alpha_max)
        beta = numbers["beta"]
        weight = self.loss_scale * torch.where(batch.by_student, beta, 1 - beta)
        of_response = {"alpha": alpha, "weight": weight, "by_student": batch.by_student.to(alpha.dtype)}
        return {name: values[:, None].expand(batch.mask.shape) for name, values in of_response.items()}

    def per_token(self, student: Tensor, teacher: Tensor | None, tokens: Tensor, given: Mapping[str, Tensor]) -> PerToken:
        assert teacher is not None, "the teacher's distribution was declared as needed"
        # Both are KL(w || alpha w + (1 - alpha) o), w whoever wrote the text and o the other.
        by_student = given["by_student"].bool().unsqueeze(-1)
        writer, other = torch.where(by_student, student, teacher), torch.where(by_student, teacher, student)
        alpha = given["alpha"]
        divergence = skew_reverse_kl(writer, other, alpha, detach_mixture=self.detach_mixture)
        return {
            "loss": given["weight"].to(divergence.dtype) * divergence,
            "divergence": divergence.detach(),
            "alpha": alpha,
            **measures(student, tokens),
        }
