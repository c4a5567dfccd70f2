"""Where actors are placed, how work reaches them, what happens when one dies.

rollouts, teachers   N replicas, each its own   a dead one is restarted, the others do its work; RLlib's actor manager knows
                                                who is healthy
learner              N ranks, one gang          a dead rank is the end of all workers: new ones go on from the newest checkpoint
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import DistError

LOG = logging.getLogger(__name__)
START_DEADLINE_S = 1800.0
"""Longest wait for GPUs, and for actors to load their models."""
NOTICE_S = 10
"""A longer wait for GPUs is told."""
NEWS_S = 60.0
"""Longest wait for the news of a death, where something has failed that may be its consequence."""

HEAP = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x2000000:glibc.malloc.trim_threshold=0x40000000"
"""On CPU, tensors live in the C library's heap. By itself it gives what is freed back to the system, which hands it out again
page by page: an eighth of a learner's step in bfloat16. So it keeps up to 1 GiB, in pages of 2 MB where the kernel has them;
tensors of more than 32 MiB go back as before."""


class ActorLost(RuntimeError):
    """An actor is gone that nobody replaces, a learner rank, the replay buffer or the last replica of a fleet; what it held is in
    the newest checkpoint."""

    def __init__(self, message: str, *, restarted: bool = False) -> None:
        """``restarted``: it has been restarted as often as it may be."""
        super().__init__(message)
        self.restarted = restarted


class Fleet:
    """Interchangeable replicas of one worker. One that dies is restarted, and its share of the work done by the others."""

    def __init__(self, name: str, actors: Sequence[ActorHandle], deadline_s: float) -> None:
        self.name, self.actors, self.deadline_s = name, list(actors), deadline_s
        self.on_restart: Callable[[], None] = lambda: None
        """Called after replicas have restarted, with their initial weights, and before they get work."""
        logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)  # what it reports is handled here
        self._manager = FaultTolerantActorManager(self.actors)
        self._recovery = threading.RLock()
        self._closed = False

    @property
    def num_healthy(self) -> int:
        """Replicas that worked when they were last asked; at least one, for without any the next call fails."""
        return max(1, len(self._manager.healthy_actor_ids()))

    def map(self, method: str, calls: Sequence[dict[str, Any]], *, kept: bool = False) -> list[Any]:
        """Each call on some healthy replica; results in the order of the calls.

        ``kept``: of the two values that the method returns, the first stays on the replica's node. Its reference comes back
        beside the second, and is this process's own: the value outlives the replica.
        """
        results: dict[int, Any] = {}
        while len(results) < len(calls):
            replicas = self._healthy()
            todo = [index for index in range(len(calls)) if index not in results][: len(replicas)]
            assignment = dict(zip(replicas, todo, strict=False))
            results |= {assignment[replica]: found for replica, found in self._round(method, assignment, calls, kept).items()}
        return [results[index] for index in range(len(calls))]

    def broadcast(self, method: str, call: dict[str, Any]) -> list[Any]:
        """The same call on every healthy replica."""
        return list(self._round(method, dict.fromkeys(self._healthy(), 0), [call]).values())

    def close(self) -> None:
        """Give the replicas back; a call that still waits for one fails."""
        self._closed = True
        for actor in self.actors:
            ray.kill(actor)

    def _round(
        self, method: str, assignment: dict[int, int], calls: Sequence[dict[str, Any]], kept: bool = False
    ) -> dict[int, Any]:
        """Make one call per replica (replica -> index of its call); results by replica, without those that died."""
        answers: dict[Any, tuple[int, Any]] = {}
        for replica, index in assignment.items():
            verb: Any = getattr(self._manager.actors()[replica], method)
            first, answer = verb.options(num_returns=2).remote(**calls[index]) if kept else (None, verb.remote(**calls[index]))
            answers[answer] = replica, first
        finished, unfinished = ray.wait([*answers], num_returns=len(answers), timeout=self.deadline_s)
        results = {}
        for answer in finished:
            replica, first = answers[answer]
            try:
                found = ray.get(answer)
            except RayTaskError as failure:  # the work itself failed: another replica would fail too
                raise failure.as_instanceof_cause() from None
            except RayActorError:
                if self._closed:
                    raise
                LOG.warning("%s replica %d has died: others do its work, or it does when it is back", self.name, replica)
                self._manager.set_actor_state(replica, healthy=False)
            else:
                results[replica] = (first, found) if kept else found
        if unfinished:
            silent = sorted(answers[answer][0] for answer in unfinished)
            raise TimeoutError(f"{self.name} fleet: replicas {silent} did not finish {method} within {self.deadline_s:g} s")
        return results

    def _healthy(self) -> list[int]:
        """Replicas that can work now. Dead ones that Ray is restarting are waited for only when there is no other."""
        with self._recovery:  # one caller looks after the dead, and nobody asks one that is back before it is ready
            return self._recovered()

    def _recovered(self) -> list[int]:
        deadline = time.monotonic() + START_DEADLINE_S
        while unhealthy := sorted(set(self._manager.actor_ids()) - set(self._manager.healthy_actor_ids())):
            answers = self._manager.foreach_actor(
                "ping", healthy_only=False, remote_actor_ids=unhealthy, timeout_seconds=START_DEADLINE_S, mark_healthy=True
            )
            failures = [answer.get() for answer in answers if not answer.ok]
            if back := sorted(set(unhealthy) & set(self._manager.healthy_actor_ids())):
                LOG.warning("%s replicas %s are back", self.name, ", ".join(map(str, back)))
                self.on_restart()
            restarting = any(isinstance(failure, ActorUnavailableError) for failure in failures)
            if self._manager.healthy_actor_ids() or not restarting or time.monotonic() > deadline:
                break
            time.sleep(1.0)
        if not (replicas := self._manager.healthy_actor_ids()):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.name} fleet: no node had room to restart a replica within {START_DEADLINE_S:g} s; add one"
                )
            raise RuntimeError(f"{self.name} fleet: no replica is alive any more, see restarts; their logs say why")
        return replicas


class LearnerGang:
    """The DeepSpeed ranks. They move together: with one rank the work of all is lost."""

    def __init__(self, ranks: Sequence[ActorHandle], deadline_s: float) -> None:
        self.ranks, self.deadline_s = list(ranks), deadline_s

    def each(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """``method(*[a[rank] for a in arguments])`` on every rank; results by rank. Raises ActorLost where one has died, does
        not answer or does not reach the others."""
        calls = [getattr(actor, method).remote(*(a[rank] for a in arguments)) for rank, actor in enumerate(self.ranks)]
        try:
            return get(calls, self.deadline_s, f"learner {method}")
        except (TimeoutError, DistError) as failure:
            raise ActorLost(f"learner {method}: {last_line(failure)}") from failure

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """``method(*arguments)`` on every rank."""
        return self.each(method, *([argument] * len(self.ranks) for argument in arguments))


class Placement:
    """Reserves all GPUs of a run at once, so that it starts whole or says what is missing; actors on CPU need no reservation."""

    def __init__(self, gpus: Sequence[float], *, crowded: bool = False) -> None:
        """``gpus``: what each actor will ask for, in the order in which they will be created. ``crowded``: more threads will
        compute at the same time than there are cores."""
        self.group: PlacementGroup | None = None
        self._next_bundle = 0
        self._crowded = crowded
        bundles = [{"GPU": amount} for amount in gpus if amount > 0]
        if bundles:
            self.group = placement_group(bundles, strategy="PACK")
            if not self.group.wait(NOTICE_S):
                LOG.warning("waiting for %g GPUs, of which %g are free", sum(gpus), ray.available_resources().get("GPU", 0.0))
            if not self.group.wait(START_DEADLINE_S):
                self.release()
                raise TimeoutError(
                    f"the cluster did not free {sum(gpus):g} GPUs within {START_DEADLINE_S:g} s: stop other jobs or add nodes"
                )

    def create(
        self, actor_class: type, *arguments: Any, gpus: float, threads: int, restarts: int = 0, starts_vllm: bool = False
    ) -> ActorHandle:
        """A remote ``actor_class(*arguments)`` on its reserved GPUs."""
        strategy: Any = "DEFAULT"
        if gpus > 0:
            assert self.group is not None, "an actor asks for GPUs that were not reserved"
            strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self._next_bundle)
            self._next_bundle += 1
        options = {"num_gpus": gpus, "num_cpus": 0, "scheduling_strategy": strategy}
        remote = ray.remote(actor_class).options(
            runtime_env={"env_vars": environment(threads, on_cpu=not gpus, crowded=self._crowded, starts_vllm=starts_vllm)},
            max_restarts=restarts,
            **options,
        )
        return remote.remote(*arguments)  # pyright: ignore[reportReturnType]  Ray says "or the class itself", for completion

    def release(self) -> None:
        """Give the reserved GPUs back."""
        if self.group is not None:
            remove_placement_group(self.group)


def environment(threads: int, *, on_cpu: bool, crowded: bool = False, starts_vllm: bool = False) -> dict[str, str]:
    """Environment variables of an actor's process; what the user has set for the C library and OpenMP's waiting stays."""
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if on_cpu and not (starts_vllm and vllm_needs_gpu()):  # Ray hides no GPU from those that ask for none
        env["CUDA_VISIBLE_DEVICES"] = ""
    wanted = {"GLIBC_TUNABLES": HEAP} if on_cpu else {}
    if crowded:  # a thread that waits for another of its process spins, on the core that the other one needs
        wanted["OMP_WAIT_POLICY"] = "passive"
    return env | {name: value for name, value in wanted.items() if name not in os.environ}


def vllm_needs_gpu() -> bool:
    """Whether the vLLM that is installed is the one for GPUs; it starts on nothing else."""
    return any(distributions(name="vllm"))


def last_line(failure: BaseException) -> str:
    """What went wrong, without where it did in another process."""
    return str(failure).strip().rpartition("\n")[2]


def any_dead(actors: Sequence[Any]) -> bool:
    """Whether one of them has died, once Ray knows: nothing new is placed on a machine that is gone. Others may be busy."""
    return any(_fates(actors))


def all_dead(actors: Sequence[Any]) -> bool:
    """Whether none of them is alive or restarted any more."""
    num_dead = 0
    for dead in _fates(actors):
        if not dead:
            return False
        num_dead += 1
    return num_dead == len(actors)


def _fates(actors: Sequence[Any]) -> Iterator[bool]:
    """Of each actor whether it has died, as that becomes known; nothing of those that give no news within a minute."""
    deadline = time.monotonic() + NEWS_S
    answers = {actor.__ray_ready__.remote(): actor for actor in actors}
    while answers and (left := deadline - time.monotonic()) > 0:
        for answer in ray.wait([*answers], timeout=left)[0]:
            actor = answers.pop(answer)
            try:
                ray.get(answer)
            except ActorUnavailableError:  # dead or out of reach
                time.sleep(1.0)
                answers[actor.__ray_ready__.remote()] = actor
            except RayActorError:
                yield True
            else:
                yield False


def get(references: Any, deadline_s: float, what: str) -> Any:
    """``ray.get`` with a deadline, and errors that speak of the work instead of the machinery."""
    try:
        return ray.get(references, timeout=deadline_s)
    except GetTimeoutError as error:
        raise TimeoutError(f"{what} did not finish within {deadline_s:g} s") from error
    except RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except RayActorError as error:
        raise ActorLost(f"{what}: the actor died: {error}") from error
