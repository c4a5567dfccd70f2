"""All workers of a run behind the verbs of the loop: generate, score, step, evaluate, publish. Closes them."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakSet, ref

import ray
from ray import ObjectRef

from raykd.actors import within_reach
from raykd.algorithms.base import Algorithm, Needs
from raykd.collate import LossTerm, deal
from raykd.experiment import Optimiser
from raykd.fleet import Fleet, LearnerGang, Placement, all_dead, any_dead, get
from raykd.mismatch import over_recorded
from raykd.records import Prompt, Rollout, Row, Totals
from raykd.rollout.requests import GenerationRequest
from raykd.usage import Usage
from raykd.weights import WeightUpdate

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a step's loss: an algorithm on some rows."""

    algorithm: Algorithm
    rows: Sequence[Row]
    weight: float = 1.0
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the algorithm counted over the rows."""


class Workers:
    """The fleets, the learner ranks and the replay buffer of one run."""

    def __init__(
        self,
        *,
        learner: LearnerGang,
        replay: Any,
        usage: Usage,
        teachers: Fleet | None = None,
        rollouts: Fleet | None = None,
        rater: Fleet | None = None,
        sleepers: Sequence[Fleet] = (),
        placement: Placement | None = None,
    ) -> None:
        """What has been started. ``sleepers``: whose engines give their GPU memory back between phases."""
        self.learner, self.teachers, self.rollouts = learner, teachers, rollouts
        self.replay, self.usage = replay, usage
        self.sleepers, self._rater, self._placement = sleepers, rater, placement
        self.in_flight = False
        """Whether new weights reach responses that are being written, else their last token is waited for."""
        self._update: WeightUpdate | None = None
        self._loading = Lock()
        self._loaded: Callable[[], WeightUpdate | None] = lambda: None
        """What the replicas hold, weakly: it keeps no memory from the next version."""
        self._published: WeakSet[WeightUpdate] = WeakSet()
        """Updates that a replica may still load."""
        self._learner_version = 0
        if rollouts:
            rollouts.on_restart = self._reload

    @property
    def _fleets(self) -> list[Fleet]:
        return [fleet for fleet in (self.teachers, self.rollouts, self._rater) if fleet is not None]

    @property
    def version(self) -> int:
        """Policy version of the learner: optimiser steps taken."""
        return self._learner_version

    def generate(
        self,
        prompts: Sequence[Prompt],
        update: WeightUpdate | None,
        *,
        samples: int,
        teacher_share: float,
        max_tokens: int,
        salt: int,
        temperature: float = 1.0,
    ) -> list[Rollout]:
        """``samples`` responses to each prompt by the student of ``update``, which ``publish`` gave, or in flight by that and
        later ones; ``salt`` tells the draws of one phase from another's."""
        assert self.rollouts is not None, "nothing samples from the student"
        self._make_room()
        self._load(update)
        requests = _requests(prompts, samples, salt, temperature)
        with self.usage.measured("generate") as measured:
            handles = self.teachers.actors if self.teachers and teacher_share > 0 else []
            num_shares = min(self.rollouts.num_healthy, len(requests))
            calls = [
                {
                    "requests": requests[i::num_shares],
                    "teacher_share": teacher_share,
                    "max_tokens": max_tokens,
                    "teachers": handles,
                }
                for i in range(num_shares)
            ]
            answers = self._written(calls, update)
            rollouts: list[Rollout] = [answers[0][0]] * len(requests)
            for i, answer in enumerate(answers):
                rollouts[i::num_shares] = answer
            measured.tokens = sum(len(rollout.tokens) for rollout in rollouts)
        return rollouts

    def _written(self, calls: Sequence[dict[str, Any]], update: WeightUpdate | None) -> list[list[Rollout]]:
        """Answers by the student of ``update``. A replica that nobody asked anything while it died and came back has its initial
        weights, and answers as if nothing had been: it shows in the version."""
        assert self.rollouts is not None
        version = update.version if update else 0

        def others(answers: Sequence[list[Rollout]]) -> list[int]:
            versions = [answer[0].version for answer in answers]
            return [i for i, written in enumerate(versions) if written != version and not (self.in_flight and written > version)]

        answers = self.rollouts.map("generate", calls)
        if update and (again := others(answers)):
            self._broadcast(self._newest(update))
            for index, answer in zip(again, self.rollouts.map("generate", [calls[i] for i in again]), strict=True):
                answers[index] = answer
        if wrong := others(answers):
            raise RuntimeError(f"replicas wrote with policy version {answers[wrong[0]][0].version} instead of {version}")
        return answers

    def sleep(self) -> None:
        """The responses of a phase are written: engines that are to sleep give their GPU memory back until the next are asked."""
        if self.sleepers:
            with self.usage.measured("sleep"):
                for fleet in self.sleepers:
                    fleet.broadcast("sleep", {})

    def _make_room(self) -> None:
        """Engines that slept need the GPU memory that learner and teachers keep for later."""
        if self.sleepers:
            self.learner.all("free_cache")
            if self.teachers:
                self.teachers.broadcast("free_cache", {})

    def score(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None = None) -> list[Row]:
        """Rows with references to what the algorithm needs of the teacher; the order is kept. ``top_k``: the algorithm's."""
        if needs is Needs.NOTHING:
            return unscored(rollouts)
        assert self.teachers is not None, "the experiment has no teacher"
        with self.usage.measured("score") as measured:
            measured.tokens = sum(len(rollout.tokens) for rollout in rollouts)
            order = {id(rollout): index for index, rollout in enumerate(rollouts)}
            shares = [share for share in deal(unscored(rollouts), self.teachers.num_healthy) if share]
            calls = [{"rollouts": [row.rollout for row in share], "needs": needs, "top_k": top_k} for share in shares]
            blocks = self.teachers.map("score", calls, kept=True)
        rows = [
            replace(row, scores=scores if needs.distribution else None, index=index, teacher_logprobs=logprobs[index])
            for share, (scores, logprobs) in zip(shares, blocks, strict=True)
            for index, row in enumerate(share)
        ]
        return sorted(rows, key=lambda row: order[id(row.rollout)])

    def teacher_answers(self, prompts: Sequence[Prompt], max_tokens: int) -> list[tuple[int, ...]]:
        """The teacher's own answers, to be looked at."""
        assert self.teachers is not None, "the experiment has no teacher"
        return self.teachers.map("answer", [{"prompts": [prompt.tokens for prompt in prompts], "max_tokens": max_tokens}])[0]

    def rate(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with what the experiment's reward says of them."""
        assert self._rater is not None, "the experiment has no reward"
        with self.usage.measured("rate"):
            (rewards,) = self._rater.map("rate", [{"rollouts": [row.rollout for row in rows]}])
        return [replace(row, reward=reward) for row, reward in zip(rows, rewards, strict=True)]

    def step(self, terms: Sequence[Term], learning_rate: float) -> dict[str, float]:
        """One optimiser step on the sum of the terms; metrics are means over the whole step."""
        with self.usage.measured("learn") as measured:
            measured.tokens = sum(len(row.rollout.tokens) for term in terms for row in term.rows)
            shares = self.learner.each("step", self._deal_whole(terms), [learning_rate] * len(self.learner.ranks))
        self._learner_version += 1
        metrics = _sum(shares)
        if squared := metrics.get("importance_weight_squared"):
            metrics["effective_sample_share"] = metrics["importance_weight"] ** 2 / squared
        return metrics

    def evaluate(self, terms: Sequence[Term]) -> dict[str, float]:
        """The terms' losses and metrics without learning."""
        with self.usage.measured("evaluate"):
            return _sum(self.learner.each("evaluate", self._deal_whole(terms)))

    def begin(self, optimiser: Optimiser) -> None:
        """A fresh optimiser for a new stage."""
        self.learner.all("begin", optimiser)

    def tune(self, optimiser: Optimiser) -> None:
        """Change the hyper-parameters of the optimiser and keep its moments."""
        self.learner.all("tune", optimiser)

    def publish(self) -> WeightUpdate | None:
        """Where the learner's newest weights lie, None before its first step; the weights do not pass through here."""
        if self.rollouts is not None and self._learner_version != (self._update.version if self._update else 0):
            with self.usage.measured("publish"):
                self._update = None  # a version that nobody writes by gives its memory to the next
                held = {update.version for update in self._published}
                update = self._update = self.learner.all("publish", self._learner_version, held)[0]
                self._published.add(update)
        return self._update

    def save(self, folder: Path) -> None:
        with self.usage.measured("save"):
            self.learner.all("save", folder)

    def restore(self, folder: Path, version: int) -> None:
        """``version`` is the policy version that the weights count as from now on."""
        self.learner.all("restore", folder)
        self._learner_version, self._update = version, None

    def save_student(self, folder: Path) -> None:
        self.learner.all("save_student", folder)

    def call_replay(self, method: str, *arguments: Any) -> Any:
        """A verb of the replay buffer."""
        return get(getattr(self.replay, method).remote(*arguments), self.learner.deadline_s, f"replay {method}")

    def lost(self) -> bool:
        """Whether a learner rank or the replay buffer has died."""
        return any_dead([*self.learner.ranks, self.replay])

    def exhausted(self) -> str:
        """The name of a fleet whose replicas have all died for good, if there is one."""
        return next((fleet.name for fleet in self._fleets if all_dead(fleet.actors)), "")

    def close(self) -> None:
        """Give every actor back."""
        for fleet in self._fleets:
            fleet.close()
        for actor in [*self.learner.ranks, self.replay]:
            ray.kill(actor)
        if self._placement:
            self._placement.release()

    def _load(self, update: WeightUpdate | None) -> None:
        """Bring every rollout replica to ``update``."""
        assert self.rollouts is not None
        with self._loading:
            if update is not None and (update := self._newest(update)) is not self._loaded():
                with self.usage.measured("load"):
                    self._broadcast(update)
                self._loaded = ref(update)

    def _newest(self, update: WeightUpdate) -> WeightUpdate:
        """``update``, or what a later phase, which is written at the same time, has loaded already."""
        loaded = self._loaded()
        return loaded if loaded and self.in_flight and loaded.version > update.version else update

    def _reload(self) -> None:
        """Replicas that came back have their initial weights. Where nobody writes by the others', they wait for the next."""
        if (update := self._loaded()) is not None:
            self._broadcast(update)

    def _broadcast(self, update: WeightUpdate) -> None:
        assert self.rollouts is not None
        versions: list[int] = []
        while not versions:  # all have died over it: the fleet waits for one that comes back, or says that none does
            if nodes := self.rollouts.broadcast("ping", {}):
                call = {"update": within_reach(update, nodes), "in_flight": self.in_flight}
                versions = self.rollouts.broadcast("load", call)
        if set(versions) != {update.version}:
            raise RuntimeError(f"rollout replicas hold policy versions {versions} after version {update.version} was published")

    def _deal_whole(self, terms: Sequence[Term]) -> list[list[LossTerm]]:
        """As ``_deal``. Scores that have gone down with a machine are computed again: in the replay buffer, too."""
        while True:
            dealt = self._deal(terms)
            blocks = [_blocks(row for term in share for row in term.rows) for share in dealt]
            lost = set(chain(*self.learner.each("lost", blocks))) if any(blocks) else set()
            if not lost:
                return dealt
            LOG.warning("a machine has died with scores on it: they are computed again")
            terms = [replace(term, rows=self._scored_again(term.rows, lost, term.algorithm)) for term in terms]
            held = self.call_replay("rows")
            if lost & {*_blocks(held)}:
                self.call_replay("rescore", self._scored_again(held, lost, terms[0].algorithm))

    def _scored_again(self, rows: Sequence[Row], lost: Collection[ObjectRef], algorithm: Algorithm) -> list[Row]:
        """The rows with new scores where they were in lost blocks."""
        gone = [row.rollout for row in rows if row.scores in lost]
        again = iter(self.score(gone, algorithm.needs, algorithm.top_k) if gone else [])
        return [replace(next(again), reward=row.reward) if row.scores in lost else row for row in rows]

    def _deal(self, terms: Sequence[Term]) -> list[list[LossTerm]]:
        """For each rank its terms; denominators stay those of the whole step."""
        per_rank: list[list[LossTerm]] = [[] for _ in self.learner.ranks]
        for term in terms:
            totals = Totals.of(term.rows, term.numbers)
            for rank, rows in enumerate(deal(list(term.rows), len(self.learner.ranks))):
                per_rank[rank].append(LossTerm(algorithm=term.algorithm, rows=rows, totals=totals, weight=term.weight))
        return per_rank


def unscored(rollouts: Sequence[Rollout]) -> list[Row]:
    """Rows for algorithms that need nothing of the teacher."""
    return [Row(rollout=rollout) for rollout in rollouts]


def _blocks(rows: Iterable[Row]) -> list[ObjectRef]:
    """The blocks that hold the rows' scores."""
    return [*{row.scores for row in rows if isinstance(row.scores, ObjectRef)}]


def _requests(prompts: Sequence[Prompt], samples: int, salt: int, temperature: float) -> list[GenerationRequest]:
    """``samples`` requests a prompt; a prompt that comes twice goes on counting: no two requests draw the same numbers."""
    counts: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        for _ in range(samples):
            requests.append(
                GenerationRequest(
                    prompt_id=prompt.id,
                    sample=counts[prompt.id],
                    prompt_tokens=prompt.tokens,
                    salt=salt,
                    temperature=temperature,
                )
            )
            counts[prompt.id] += 1
    return requests


def _sum(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Ranks hand in their shares of every metric."""
    names = dict.fromkeys(name for share in shares for name in share)
    return over_recorded({name: sum(share.get(name, 0.0) for share in shares) for name in names})
