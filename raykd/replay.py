"""The replay buffer: owns token records, holds references to teacher scores, decides how often a row is learned from.

Tokens are the truth, scores a cache: the teacher is frozen, so a lost score is computed again, a lost token would be a bug.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raykd.algorithms.base import Replay
from raykd.records import Row


class ReplayBuffer:
    """First in, first out, with the three bounds of a ``Replay``: capacity, staleness, uses of a row.

    Rows with the most uses left are drawn first, uniformly without replacement among equals: ``samples_per_insert = k`` on a
    freshly filled buffer is therefore exactly k shuffled epochs over it, and without a bound every draw is uniform.
    """

    def __init__(self, seed: int = 0) -> None:
        self._bounds = Replay()
        self._rows: list[Row] = []
        self._uses_left: list[float] = []
        self._random = np.random.default_rng(seed)

    def begin(self, bounds: Replay) -> None:
        """Forget every row: a stage starts with rows and bounds of its own."""
        self._bounds = bounds
        self._keep([])

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; the oldest leave when the capacity is passed."""
        self._rows += rows
        self._uses_left += [self._bounds.samples_per_insert or math.inf] * len(rows)
        surplus = max(0, len(self._rows) - self._bounds.capacity)
        del self._rows[:surplus], self._uses_left[:surplus]

    def held(self, version: int) -> int:
        """How many rows are fresh enough at policy version ``version``."""
        self._drop_stale(version)
        return len(self._rows)

    def sample(self, count: int, version: int) -> list[Row]:
        """Up to ``count`` distinct rows that are fresh enough at policy version ``version``; their uses are spent.

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

    def state(self) -> dict[str, Any]:
        """Everything but the references to scores, which a restored run computes again."""
        return {
            "bounds": self._bounds,
            "rows": [replace(row, scores=None, index=0) for row in self._rows],
            "uses_left": list(self._uses_left),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self._bounds, self._rows, self._uses_left = state["bounds"], list(state["rows"]), list(state["uses_left"])
        self._random.bit_generator.state = state["random"]

    def rows(self) -> list[Row]:
        """Every row, the oldest first."""
        return list(self._rows)

    def rescore(self, rows: Sequence[Row]) -> None:
        """The same rows with their scores computed again."""
        assert [row.rollout for row in rows] == [row.rollout for row in self._rows], "rows change in their scores alone"
        self._rows = list(rows)

    def _drop_stale(self, version: int) -> None:
        limit = self._bounds.max_staleness

        def fresh(row: Row) -> bool:
            return limit is None or row.rollout.student_logprobs is None or version - row.rollout.version <= limit

        self._keep([i for i, row in enumerate(self._rows) if fresh(row)])

    def _keep(self, indices: list[int]) -> None:
        self._rows = [self._rows[i] for i in indices]
        self._uses_left = [self._uses_left[i] for i in indices]
