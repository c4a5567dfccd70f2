"""Responses written by the student, the teacher or both, on vLLM."""

from raykd.rollout.config import EngineSettings
from raykd.rollout.requests import GenerationRequest

__all__ = ["EngineSettings", "GenerationRequest"]
