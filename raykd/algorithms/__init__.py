"""The methods of distillation: one frozen value each, told apart in JSON by ``kind``."""

from typing import Annotated

from pydantic import Field

from raykd.algorithms.akl import AKL
from raykd.algorithms.base import Algorithm, Mixture, Needs, Progress
from raykd.algorithms.distillm import AdaptiveSchedule, AdaptiveState, DistiLLM
from raykd.algorithms.gkd import GKD, KD, ImitKD
from raykd.algorithms.minillm import MiniLLM
from raykd.algorithms.sft import SFT, SeqKD

AnyAlgorithm = Annotated[SFT | SeqKD | KD | ImitKD | GKD | DistiLLM | AKL | MiniLLM, Field(discriminator="kind")]

__all__ = [
    "AKL",
    "GKD",
    "KD",
    "SFT",
    "AdaptiveSchedule",
    "AdaptiveState",
    "Algorithm",
    "AnyAlgorithm",
    "DistiLLM",
    "ImitKD",
    "MiniLLM",
    "Mixture",
    "Needs",
    "Progress",
    "SeqKD",
]
