"""The learner without DeepSpeed: one rank, float32, PyTorch's own AdamW, which is what DeepSpeed's stage 0 runs as well."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raykd.experiment import LearnerConfig
from raykd.learner import Learner
from raykd.projection import Head
from raykd.rank import connect
from raykd.student import Student

STATE = "plain.pt"


class PlainLearner(Learner):
    """Every verb is the learner's own; only the engine under it is another."""

    def __init__(
        self, model: str, *, config: LearnerConfig, address: tuple[str, int], vocab_size: int, pad_id: int, teacher_head: Head
    ) -> None:
        self.config, self.rank = config, 0
        self._vocab_size, self._pad_id, self._teacher_head, self._fetch = vocab_size, pad_id, teacher_head, lambda block: block
        self.device = connect(0, 1, address, config.deadline_s)
        self._student = Student(
            model,
            dtype=torch.float32,
            vocab_size=vocab_size,
            chunk=config.chunk,
            teacher_head=teacher_head,
            activation_checkpointing=False,
        )
        self._gather = nullcontext
        self._engine: Any = PlainEngine(self._student)
        self._state = self._student.model.state_dict(keep_vars=True)
        self._clip = 1.0


class PlainEngine:
    """The part of DeepSpeed's engine that the learner calls."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self.basic_optimizer = torch.optim.AdamW(student.parameters())

    def __call__(self, **arguments: Any) -> Any:
        return self._student(**arguments)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Nothing is exchanged at one."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.basic_optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.basic_optimizer.zero_grad()

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        """All of it in one file; which checkpoint is the latest is the learner's to say."""
        target = Path(folder, tag)
        target.mkdir(parents=True)
        state = {"student": self._student.state_dict(), "adam": self.basic_optimizer.state_dict(), "client": client_state}
        torch.save(state, target / STATE)

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, dict[str, Any]]:
        """The folder, and the caller's own state."""
        state = torch.load(Path(folder, tag, STATE))
        self._student.load_state_dict(state["student"])
        self.basic_optimizer.load_state_dict(state["adam"])
        return folder, state["client"]
