"""vLLM as rollouts and teachers start it."""

from raykd.engine.starting import STEPPING, prepare, start

__all__ = ["STEPPING", "prepare", "start"]
