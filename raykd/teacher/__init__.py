"""The teacher: what an algorithm needs of its distribution, from hidden states that Hugging Face or vLLM computes."""

from raykd.teacher.worker import PROBE_EVERY, Teacher

__all__ = ["PROBE_EVERY", "Teacher"]
