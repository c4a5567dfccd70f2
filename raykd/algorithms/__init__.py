"""The methods of distillation: one frozen value each, told apart in JSON by ``kind``."""

from typing import Annotated

from pydantic import Field

from raykd.algorithms.akl import AKL
from raykd.algorithms.base import Algorithm, Mixture, Needs, Progress, Replay
from raykd.algorithms.distillm import AdaptiveSchedule, AdaptiveState, DistiLLM
from raykd.algorithms.distillm2 import DistiLLM2
from raykd.algorithms.gkd import GKD, KD, ImitKD
from raykd.algorithms.minillm import MiniLLM
from raykd.algorithms.opd import OPD
from raykd.algorithms.sft import SFT, SeqKD

AnyAlgorithm = Annotated[
    SFT | SeqKD | KD | ImitKD | GKD | DistiLLM | DistiLLM2 | AKL | MiniLLM | OPD, Field(discriminator="kind")
]

__all__ = [
    "AKL",
    "GKD",
    "KD",
    "OPD",
    "SFT",
    "AdaptiveSchedule",
    "AdaptiveState",
    "Algorithm",
    "AnyAlgorithm",
    "DistiLLM",
    "DistiLLM2",
    "ImitKD",
    "MiniLLM",
    "Mixture",
    "Needs",
    "Progress",
    "Replay",
    "SeqKD",
]
