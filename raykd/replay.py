"""The replay buffer: owns token records, holds references to teacher scores, decides how often a row is learned from.

Tokens are the truth, scores a cache: the teacher is frozen, so a lost score is computed again, a lost token would be a bug.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from raykd.records import Row


class ReplayBuffer:
    """First in, first out, with three bounds: ``capacity`` rows, ``samples_per_insert`` uses of each, ``max_staleness`` versions.

    Rows with the most uses left are drawn first, uniformly without replacement among equals: ``samples_per_insert = k`` on a
    freshly filled buffer is therefore exactly k shuffled epochs over it.
    """

    def __init__(self, capacity: int, max_staleness: int, seed: int = 0) -> None:
        if capacity < 1 or max_staleness < 0:
            raise ValueError(f"replay: capacity {capacity} must be at least 1, max_staleness {max_staleness} at least 0")
        self.capacity, self.max_staleness = capacity, max_staleness
        self._rows: list[Row] = []
        self._uses_left: list[int] = []
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: list[Row], samples_per_insert: int = 1) -> int:
        """Append rows, the oldest leave when ``capacity`` is passed; returns how many are held."""
        if samples_per_insert < 1:
            raise ValueError(
                f"replay: samples_per_insert {samples_per_insert} must be at least 1: a row is there to be learned from"
            )
        self._rows += rows
        self._uses_left += [samples_per_insert] * len(rows)
        surplus = max(0, len(self._rows) - self.capacity)
        del self._rows[:surplus], self._uses_left[:surplus]
        return len(self._rows)

    def sample(self, count: int, version: int) -> list[Row]:
        """Up to ``count`` distinct rows no older than ``max_staleness`` policy versions; their uses are spent.

        Fewer come back when fewer are held: the caller then generates. Rows from the data set never grow stale.
        """
        self._drop_stale(version)
        order = self._random.permutation(len(self._rows))
        chosen = sorted(order, key=lambda i: -self._uses_left[i])[:count]  # sorted is stable: ties stay shuffled
        rows = [self._rows[i] for i in chosen]
        for i in chosen:
            self._uses_left[i] -= 1
        self._keep([i for i, uses in enumerate(self._uses_left) if uses > 0])
        return rows

    def clear(self) -> None:
        """Forget every row: a new stage starts with rows of its own."""
        self._keep([])

    def state(self) -> dict[str, Any]:
        """Everything but the scores, which a restored run computes again."""
        return {
            "rows": [replace(row, scores=None, index=0) for row in self._rows],
            "uses_left": list(self._uses_left),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._rows, self._uses_left = list(state["rows"]), list(state["uses_left"])
        self._random.bit_generator.state = state["random"]

    def _drop_stale(self, version: int) -> None:
        def fresh(row: Row) -> bool:
            return row.rollout.student_logprobs is None or version - row.rollout.version <= self.max_staleness

        self._keep([i for i, row in enumerate(self._rows) if fresh(row)])

    def _keep(self, indices: list[int]) -> None:
        self._rows = [self._rows[i] for i in indices]
        self._uses_left = [self._uses_left[i] for i in indices]
