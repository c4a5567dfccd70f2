"""What the papers claim, as comparisons of two variants by one measure, and what this pair says to each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from comparison.results import Spread


class Verdict(StrEnum):
    """A difference counts from twice its standard error on."""

    YES = "reproduced"
    NO = "not reproduced: the opposite"
    NOISE = "not reproduced: within the noise"
    OPEN = "not run"


@dataclass(frozen=True, slots=True)
class Claim:
    """``better`` has the lower (or higher) value of ``measure``."""

    paper: str
    better: str
    worse: str
    measure: str
    higher: bool = False


EXPOSURE = tuple(Claim("MiniLLM", own, other, "excess_error") for own in ("minillm", "gkd") for other in ("sft", "kd", "seq_kd"))
ABLATED = (
    *(
        Claim("MiniLLM", "minillm", f"minillm_no_{part}", measure, higher)
        for part in ("length_norm", "mixing", "single_step")
        for measure, higher in (("rouge_l", True), ("reverse_kl", False))
    ),
    *EXPOSURE,
    *(
        Claim("GKD", more, less, measure, higher)
        for more, less in (("gkd", "gkd_half"), ("gkd_half", "gkd_data"), ("gkd", "gkd_data"), ("forward_kl_student", "kd"))
        for measure, higher in (("reverse_kl", False), ("rouge_l_to_teacher", True))
    ),
    *(
        Claim("DistiLLM", skew, plain, measure, higher)
        for skew, plain in (("skew_forward_data", "kd"), ("skew_reverse_data", "reverse_kl_data"))
        for measure, higher in (("rouge_l", True), ("reverse_kl", False), ("gradient_spread", False))
    ),
    *(Claim("DistiLLM", fast, "skew_reverse_student", "seconds") for fast in ("distillm", "skew_reverse_replay")),
    *(
        Claim("AKL", "akl", other, measure, higher)
        for other in ("kd", "reverse_kl_data", "jeffreys_data")
        for measure, higher in (("rouge_l", True), ("forward_kl", False), ("reverse_kl", False))
    ),
)
ON_DOLLY = (
    *(Claim("MiniLLM", "minillm", other, "rouge_l", True) for other in ("sft", "kd", "seq_kd")),
    *EXPOSURE,
    *(Claim("GKD", "gkd", other, "rouge_l", True) for other in ("sft", "kd", "seq_kd")),
    *(Claim("DistiLLM", "distillm", other, "rouge_l", True) for other in ("sft", "kd", "seq_kd", "minillm", "gkd")),
    *(Claim("DistiLLM", "distillm", other, "seconds") for other in ("minillm", "gkd")),
    *(Claim("AKL", "akl", other, "rouge_l", True) for other in ("sft", "kd", "seq_kd")),
)
CLAIMS: Mapping[str, tuple[Claim, ...]] = {"fifth": ABLATED, "dolly": ON_DOLLY}
"""By pair: the ablations where all of them ran, the order of the methods on the data of the papers' tables."""


def verdict(claim: Claim, difference: Spread, noise: float) -> Verdict:
    """``difference`` is better minus worse, seed by seed; ``noise`` the deviation between seeds of one variant."""
    if not difference.values:
        return Verdict.OPEN
    gain, limit = difference.mean * (1 if claim.higher else -1), threshold(difference, noise)
    return Verdict.YES if gain > limit else Verdict.NO if gain < -limit else Verdict.NOISE


def threshold(difference: Spread, noise: float) -> float:
    """Twice the standard error of a mean difference of two variants: 2 noise sqrt(2 / n), n seeds."""
    return 2 * noise * math.sqrt(2 / len(difference.values))


PUBLISHED: Mapping[str, str] = {
    "sft": "0.5 (c)",
    "kd": "1",
    "gkd": "3.2 (c); 1.8 to 2.2 (b)",
    "minillm": "6.9 (c)",
    "distillm": "1.6 (a); 2.1 (c)",
}
"""Training time relative to word-level KD: (a) DistiLLM's paper, which gives 3 to 7 for others; (b) GKD's, on GSM8K, against
fixed data; (c) seconds a sample as measured by others, GPT-2 1.5B -> 0.1B (CVenginner/ICML-rebuttal)."""

SYSTEM: Mapping[str, Mapping[str, float]] = {
    "fifth": {
        "sft": 0.43,
        "kd": 1.0,
        "akl": 1.12,
        "distillm": 1.30,
        "imit_kd": 2.14,
        "opd": 2.50,
        "gkd": 2.68,
        "minillm": 3.70,
        "distillm2": 6.94,
        "seq_kd": 7.17,
    }
}
"""The same through the whole system, actors and engines included: the 96 steps of the files ``stories_*.py``, one seed each, two
CPU cores with other work beside it (load 1.2 to 3)."""
