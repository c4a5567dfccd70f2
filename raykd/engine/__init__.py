"""vLLM as rollouts and teachers start it."""

from raykd.engine.starting import STEPPING, prepare, start, turn_on_gpu

__all__ = ["STEPPING", "prepare", "start", "turn_on_gpu"]
