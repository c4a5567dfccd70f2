"""The replay buffer: owns token records, holds references to teacher scores, decides how often a row is learned from.

Tokens are the truth, scores a cache: the teacher is frozen, so a lost score is computed again, a lost token would be a bug.
Memory is bounded by the capacity and by Ray: referenced scores that its object store has no room for go to the disk
(``object_spilling_directory`` of ``ray start``) and come back when a learner fetches them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raykd.algorithms.base import Replay
from raykd.records import Row, Source


class ReplayBuffer:
    """First in, first out, with the bounds of a ``Replay``: capacity, staleness, uses of a row, shares of a batch.

    Rows with the most uses left are drawn first, uniformly without replacement among equals: ``samples_per_insert = k`` on a
    freshly filled buffer is therefore exactly k shuffled epochs over it, and without a bound every draw is uniform. With shares
    the draw is stratified: of n rows so far, a writer with share s has written n s, less than one row more or less.
    """

    def __init__(self, seed: int = 0) -> None:
        self._bounds = Replay()
        self._rows: list[Row] = []
        self._uses_left: list[float] = []
        self._owed: dict[Source, float] = {}
        self._random = np.random.default_rng(seed)

    def begin(self, bounds: Replay) -> None:
        """Forget every row: a stage starts with rows and bounds of its own."""
        self._owed = {}
        self._keep([])
        self.bound(bounds)

    def bound(self, bounds: Replay) -> None:
        """Go on with the same rows under other bounds."""
        self._bounds = bounds
        self._owed = {author: self._owed.get(author, 0.0) for author in bounds.shares or {}}

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; the oldest leave when the capacity is passed."""
        self._rows += rows
        self._uses_left += [self._bounds.samples_per_insert or math.inf] * len(rows)
        surplus = max(0, len(self._rows) - self._bounds.capacity)
        del self._rows[:surplus], self._uses_left[:surplus]

    def held(self, version: int) -> int:
        """How many rows will be fresh enough at policy version ``version``, which may lie ahead."""
        return sum(self._is_fresh(row, version) for row in self._rows)

    def sample(self, count: int, version: int) -> list[Row]:
        """Up to ``count`` distinct rows that are fresh enough at policy version ``version``; their uses are spent.

        Fewer come back when fewer are held (``held`` tells beforehand). Rows from the data set never grow stale. Where a writer
        has too few rows for its share, others take their places.
        """
        self._drop_stale(version)
        order = self._random.permutation(len(self._rows))
        order = sorted(order, key=lambda i: -self._uses_left[i])  # sorted is stable: ties stay shuffled
        chosen = self._stratified(order, count)[:count]
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
            "owed": dict(self._owed),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self._bounds, self._rows, self._uses_left = state["bounds"], list(state["rows"]), list(state["uses_left"])
        self._owed = dict(state["owed"])
        self._random.bit_generator.state = state["random"]

    def rows(self) -> list[Row]:
        """Every row, the oldest first."""
        return list(self._rows)

    def rescore(self, rows: Sequence[Row]) -> None:
        """The same rows with their scores computed again."""
        assert [row.rollout for row in rows] == [row.rollout for row in self._rows], "rows change in their scores alone"
        self._rows = list(rows)

    def _stratified(self, order: list[int], count: int) -> list[int]:
        """The order with each writer's next rows in front, as many as its share of ``count``."""
        if not self._owed:
            return order
        first: list[int] = []
        quotas = self._quotas(min(count, len(order)))
        for i in order:
            author = self._rows[i].rollout.source.author
            if quotas.get(author, 0) > 0:
                quotas[author] -= 1
                first.append(i)
        return list(dict.fromkeys([*first, *order]))

    def _quotas(self, count: int) -> dict[Source, int]:
        """Whole rows of each writer, ``count`` in all; what rounding leaves is owed to it, or by it, in later batches."""
        for author, share in (self._bounds.shares or {}).items():
            self._owed[author] += share * count
        quotas = {author: max(0, math.floor(owed)) for author, owed in self._owed.items()}
        for author in sorted(quotas, key=lambda a: quotas[a] - self._owed[a])[: count - sum(quotas.values())]:
            quotas[author] += 1
        for author, quota in quotas.items():
            self._owed[author] -= quota
        return quotas

    def _drop_stale(self, version: int) -> None:
        self._keep([i for i, row in enumerate(self._rows) if self._is_fresh(row, version)])

    def _is_fresh(self, row: Row, version: int) -> bool:
        limit = self._bounds.max_age
        return limit is None or row.rollout.student_logprobs is None or version - row.rollout.version <= limit

    def _keep(self, indices: list[int]) -> None:
        self._rows = [self._rows[i] for i in indices]
        self._uses_left = [self._uses_left[i] for i in indices]
