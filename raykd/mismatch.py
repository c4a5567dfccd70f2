"""How far the learner's log-probs of a response are from those that the rollout engine recorded.

On the policy that wrote the text it is the disagreement of two programs, later also what was learned since. It is a mean over the
recorded tokens: those of the data set have nothing to differ from.
"""

from collections.abc import Mapping

from torch import Tensor, nan, where

from raykd.logprobs import gather
from raykd.projection import Reduce
from raykd.records import Batch

RECORDED = "recorded_logprob"
MISMATCH, SHARE = "logprob_mismatch", "recorded_share"
MOST = 0.3
"""Nats a token: rounding to bfloat16 makes a few hundredths, an architecture that engine or learner gets wrong about one."""


def recorded_logprobs(batch: Batch) -> dict[str, Tensor]:
    """log q as the rollout engine recorded it, NaN where it did not; ``[B, T]``."""
    return {RECORDED: batch.student_logprobs.masked_fill(~batch.by_student[:, None], nan)}


def with_mismatch(reduce: Reduce) -> Reduce:
    """``reduce`` and two more metrics: |log q - recorded|, 0 where nothing was recorded, and whether something was."""

    def watched(student: Tensor, teacher: Tensor | None, tokens: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        recorded = given[RECORDED]
        known = ~recorded.isnan()
        mismatch = where(known, (gather(student.detach(), tokens) - recorded).abs(), 0.0)
        return reduce(student, teacher, tokens, given) | {MISMATCH: mismatch, SHARE: known.to(mismatch.dtype)}

    return watched


def over_recorded(metrics: dict[str, float]) -> dict[str, float]:
    """Means over all tokens -> the mismatch a mean over the recorded ones; absent where there are none."""
    means = {name: value for name, value in metrics.items() if not name.endswith((MISMATCH, SHARE))}
    for name, share in metrics.items():
        if name.endswith(SHARE) and share > 0:
            of_term = name.removesuffix(SHARE) + MISMATCH
            means[of_term] = metrics[of_term] / share
    return means


def disagreement(metrics: Mapping[str, float]) -> str:
    """One sentence where the programs disagree about text that the learner's own weights wrote; else nothing."""
    if metrics.get(MISMATCH, 0.0) <= MOST:
        return ""
    return (
        f"engine and learner disagree about this student by {metrics[MISMATCH]:.2f} nats a token, on average over what it has "
        "just written, where rounding makes a few hundredths; docs/models.md has the families of models that were checked"
    )
