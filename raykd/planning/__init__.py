"""What an experiment takes, before it starts: memory, traffic, storage (``memory.py``), and time (``durations.py``)."""

from raykd.planning.memory import Plan, Room, Worker, gpu_bytes, plan
from raykd.planning.size import Size

__all__ = ["Plan", "Room", "Size", "Worker", "gpu_bytes", "plan"]
