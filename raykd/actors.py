"""The workers as Ray actors: thin shells that turn references into values and values into references."""

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raykd.algorithms.base import Needs
from raykd.between_nodes import Reader, available
from raykd.engine import turn_on_gpu
from raykd.experiment import LearnerConfig, Optimiser, RewardConfig, RolloutConfig, TeacherConfig
from raykd.records import Rollout, Scores
from raykd.rollout.config import EngineSettings
from raykd.sharing import let_go
from raykd.weights import Bucket, WeightUpdate, fetched

OBJECT_STORE = "/plasma"
"""In the path of Ray's shared memory."""
GATHERING_S = 0.001
"""How long a message to a teacher engine waits for more turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What every worker must agree on."""

    student: str
    """Folder or Hub name of the student's initial weights."""
    teacher: str | None
    vocab_size: int
    """Size of the shared tokenizer: every softmax runs over exactly these ids."""
    eos_ids: tuple[int, ...]
    """Whoever writes a response, any of them ends it."""
    max_length: int
    """Longest prompt and response together."""
    seed: int
    run: str | None = None
    """The run directory; None where nobody saves anything."""

    def check(self, *folders: str | None) -> None:
        """Raises ValueError where this node does not see a folder that the driver's node has."""
        for folder in folders:
            if folder and Path(folder).is_absolute() and not Path(folder).is_dir():
                raise ValueError(
                    f"node {ray.util.get_node_ip_address()} does not see {folder}: models and run directories (--runs) must "
                    "be on storage that every node mounts"
                )

    def engine(self, replicas: RolloutConfig | TeacherConfig) -> EngineSettings:
        """Settings of the vLLM engine that writes, for these models."""
        engine, sleep = replicas.engine.model_dump(), replicas.sleep
        return EngineSettings(max_length=self.max_length, vocab_size=self.vocab_size, seed=self.seed, sleep=sleep, **engine)


class _Replica:
    """What RLlib's actor manager asks of an actor."""

    async def ping(self) -> str:
        """The node it is on."""
        return ray.get_runtime_context().get_node_id()

    async def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        result = func(self, **kwargs)
        return await result if inspect.isawaitable(result) else result


class RolloutActor(_Replica):
    """One student engine."""

    def __init__(self, config: RolloutConfig, facts: ModelFacts) -> None:
        from raykd.rollout.worker import RolloutWorker

        facts.check(facts.student)
        self._worker = RolloutWorker(facts.student, facts.engine(config), facts.eos_ids)

    async def generate(
        self, requests: Sequence[Any], teacher_share: float, max_tokens: int, teachers: list[ActorHandle]
    ) -> list[Rollout]:
        writer = RemoteWriter(teachers) if teacher_share > 0 else None
        return await self._worker.generate(requests, teacher_share=teacher_share, max_tokens=max_tokens, teacher=writer)

    async def gpus(self) -> list[str | None]:
        """UUIDs of the engine's devices, None on CPU."""
        return self._worker.engine.gpus

    async def reads_other_nodes(self) -> bool:
        return available()

    async def load(self, update: WeightUpdate, in_flight: bool) -> int:
        if update.remote and update.node != await self.ping():
            update = await asyncio.to_thread(fetched, update, self._reader)
        buckets = [await bucket if isinstance(bucket, ray.ObjectRef) else bucket for bucket in update.buckets]
        return await self._worker.load(replace(update, buckets=tuple(buckets)), in_flight=in_flight)

    async def sleep(self) -> None:
        await self._worker.sleep()

    @cached_property
    def _reader(self) -> Reader:
        return Reader()


def within_reach(update: WeightUpdate, nodes: Collection[str]) -> WeightUpdate:
    """The update for replicas on ``nodes``: through Ray's object store if the learner's memory is out of reach of one."""
    if update.remote or set(nodes) <= {update.node}:
        return update
    there = NodeAffinitySchedulingStrategy(update.node, soft=False)
    read: Any = ray.remote(_read).options(num_cpus=0, num_returns=1 + len(update.buckets), scheduling_strategy=there)
    _, *references = read.remote(update.buckets)  # the first is there because Ray makes no list of a single one
    return replace(update, buckets=tuple(references))


def _read(buckets: Sequence[Bucket]) -> list[Bucket | None]:
    """A task on the learner's node."""
    return [None, *(replace(bucket, place=bucket.data) for bucket in buckets)]


class TeacherActor(_Replica):
    """The frozen teacher: scores responses, and writes its tokens of teacher-mixed ones."""

    def __init__(self, config: TeacherConfig, facts: ModelFacts, writes: bool) -> None:
        from raykd.teacher import Teacher

        assert facts.teacher is not None
        facts.check(facts.teacher)
        with turn_on_gpu():
            self._teacher = Teacher(facts.teacher, config, vocab_size=facts.vocab_size, max_length=facts.max_length)
        self._eos_ids = facts.eos_ids
        self._reading = asyncio.Lock()  # memory and threads are those of one call
        self._engine = None
        if writes:
            from raykd.rollout.vllm_engine import VllmEngine

            self._engine = VllmEngine(facts.teacher, facts.engine(config), facts.eos_ids)

    async def score(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None) -> tuple[Scores | None, list[Any]]:
        """``Teacher.shared``; the block is to stay in this node's object store."""
        async with self._reading:
            return await asyncio.to_thread(self._teacher.shared, rollouts, needs, top_k)

    async def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
        async with self._reading:
            return await asyncio.to_thread(self._teacher.answer, prompts, max_tokens, self._eos_ids)

    @ray.method(enable_task_events=False)  # hundreds a second, which would push all others out of Ray's record
    async def complete(self, turns: Sequence[tuple[Sequence[int], int, str]], max_tokens: int) -> list[Any]:
        """Continue several texts, each given with its seed and session."""
        engine = self._engine
        assert engine is not None, "no stage mixes teacher tokens in"
        return await asyncio.gather(*(engine.complete(text, max_tokens, seed, session=name) for text, seed, name in turns))

    @ray.method(enable_task_events=False)
    async def forget(self, session: str) -> None:
        if self._engine is not None:
            await self._engine.forget(session)

    async def sleep(self) -> None:
        """Put the writing engine to sleep: it gives its GPU memory back."""
        if self._engine is not None:
            await self._engine.sleep()

    async def free_cache(self) -> None:
        """Give the GPU memory back that is kept for the next scores."""
        torch.cuda.empty_cache()

    async def head(self) -> list[ray.ObjectRef]:
        """A list of one reference, to the head that every learner rank keeps a frozen copy of."""
        return [ray.put(self._teacher.head())]


class RewardActor(_Replica):
    """The experiment's reward of a response."""

    def __init__(self, config: RewardConfig, facts: ModelFacts) -> None:
        from raykd.reward import Reward

        self._reward = Reward(config, tokenizer=facts.student)

    async def rate(self, rollouts: Sequence[Rollout]) -> list[float]:
        return await asyncio.to_thread(self._reward.rate, rollouts)


class RemoteWriter:
    """The teacher engines as one writer: a session stays with the engine that keeps its text, for as long as that lives.

    Turns that begin together and have the same length mostly end at the same step of an engine: they travel as one message,
    since a process handles only about a thousand messages a second.
    """

    def __init__(self, handles: Sequence[ActorHandle]) -> None:
        self._handles: deque[Any] = deque(handles)
        self._sessions: dict[str, Any] = {}
        self._messages: dict[tuple[Any, int], tuple[list[Any], asyncio.Task[list[Any]]]] = {}

    async def complete(self, text: Sequence[int], max_tokens: int, seed: int, *, session: str) -> Any:
        while True:
            if (handle := self._sessions.get(session)) is None:
                self._handles.rotate()
                handle = self._sessions[session] = self._handles[0]
            try:
                return await self._join_message(handle, max_tokens, (text, seed, session))
            except ActorUnavailableError:  # it is being restarted
                await asyncio.sleep(1.0)
            except ActorDiedError:
                if self._handles == deque([handle]):
                    raise
                with suppress(ValueError):  # another session may have found out first
                    self._handles.remove(handle)
            del self._sessions[session]  # any engine can go on: every call brings the whole text

    async def forget(self, session: str) -> None:
        if (handle := self._sessions.pop(session, None)) is not None:
            handle.forget.remote(session)

    async def _join_message(self, handle: Any, max_tokens: int, turn: Any) -> Any:
        key = handle, max_tokens
        if key not in self._messages:
            self._messages[key] = [], asyncio.create_task(self._send(*key))
        turns, answers = self._messages[key]
        turns.append(turn)
        place = len(turns) - 1
        return (await asyncio.shield(answers))[place]  # one turn may be given up, not the others

    async def _send(self, handle: Any, max_tokens: int) -> list[Any]:
        await asyncio.sleep(GATHERING_S)
        turns, _ = self._messages.pop((handle, max_tokens))
        return await handle.complete.remote(turns, max_tokens)


class LearnerActor:
    """One learner rank; every verb is the learner's own."""

    def __init__(self, config: LearnerConfig, facts: ModelFacts, rank: int) -> None:
        self._config, self._facts, self._rank = config, facts, rank

    def check(self) -> None:
        """Raises ValueError where a folder is missing on this node."""
        self._facts.check(self._facts.student, self._facts.run)

    def address(self) -> tuple[str, int]:
        """Where this rank listens for the others, as rank 0, and for itself."""
        from raykd.rank import meeting_place

        host = ray.util.get_node_ip_address()
        self._meeting_place = meeting_place(host)
        return host, self._meeting_place.port

    def start(self, address: tuple[str, int], heads: list[ray.ObjectRef]) -> None:
        from raykd.learner import Learner

        with turn_on_gpu():
            self._learner = Learner(
                self._facts.student,
                config=self._config,
                rank=self._rank,
                address=address,
                vocab_size=self._facts.vocab_size,
                teacher_head=ray.get(heads[0]) if heads else None,
                fetch=ray.get,
            )
        let_go(OBJECT_STORE)  # the teacher's head has been copied from there

    def gpu(self) -> str | None:
        return self._learner.gpu

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def publish_on_gpu(self) -> None:
        self._learner.publish_on_gpu()

    def publish_between_nodes(self) -> None:
        """Offer published weights to other nodes, if NIXL is installed."""
        if available():
            self._learner.publish_between_nodes()

    def free_cache(self) -> None:
        """Give the GPU memory back that is kept for the next step."""
        torch.cuda.empty_cache()

    def begin(self, optimiser: Optimiser) -> None:
        self._learner.begin(optimiser)

    def tune(self, optimiser: Optimiser) -> None:
        self._learner.tune(optimiser)

    def lost(self, blocks: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """Which of these blocks of scores no machine has any more; the others are on this node now."""
        if blocks:  # fetched at the same time
            ray.wait(blocks, num_returns=len(blocks))
        return [block for block in blocks if not _is_there(block)]

    def step(self, terms: Sequence[Any], learning_rate: float) -> dict[str, float]:
        return self._learner.step(terms, learning_rate)

    def evaluate(self, terms: Sequence[Any]) -> dict[str, float]:
        return self._learner.evaluate(terms)

    def publish(self, version: int, held: Collection[int]) -> WeightUpdate | None:
        update = self._learner.publish(version, held)
        return update and replace(update, node=self.node())

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def restore(self, folder: Path) -> None:
        self._learner.restore(folder)

    def save_student(self, folder: Path) -> None:
        self._learner.save_student(folder)


def _is_there(block: ray.ObjectRef) -> bool:
    try:
        ray.get(block)
    except ObjectLostError:
        return False
    return True
