"""What a run is: one frozen, validated value, to and from JSON. Impossible settings cannot be written.

Workers never see an ``Experiment``; each gets its own small part of it.
"""

from raykd.experiment.run import EvaluationConfig, Experiment, Model, TrackingConfig
from raykd.experiment.stage import HIGHER_IS_BETTER, Kept, Optimiser, Stage
from raykd.experiment.workers import (
    ClassifierReward,
    EngineConfig,
    FunctionReward,
    LearnerConfig,
    LoRA,
    RewardConfig,
    RolloutConfig,
    TeacherConfig,
)

__all__ = [
    "HIGHER_IS_BETTER",
    "ClassifierReward",
    "EngineConfig",
    "EvaluationConfig",
    "Experiment",
    "FunctionReward",
    "Kept",
    "LearnerConfig",
    "LoRA",
    "Model",
    "Optimiser",
    "RewardConfig",
    "RolloutConfig",
    "Stage",
    "TeacherConfig",
    "TrackingConfig",
]
