"""What an actor's process is given at its start, and what a fleet does about those that die."""

import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError
from torch.distributed import DistBackendError

from raykd.algorithms import SFT
from raykd.experiment import Experiment, Model, Stage
from raykd.fleet import ActorLost, Fleet, LearnerGang, all_dead, any_dead, environment
from raykd.records import Prompt
from raykd.run import connect
from raykd.sources import Pairs
from raykd.usage import Usage
from raykd.weights import WeightUpdate
from raykd.workers import Workers

PROMPTS = [Prompt(id=str(i), tokens=(1,), response=()) for i in range(2)]

COUNT_FAULTS = """
import resource, numpy
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return [numpy.ones(size << 17) for size in (4, 16, 30)]  # MiB
work()
before = faults()
for _ in range(20):
    work()
print(faults() - before)
"""


def faults(env: dict[str, str]) -> int:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT_FAULTS]
    return int(subprocess.run(command, env=bare | env, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are glibc's settings")
def test_a_process_on_cpu_keeps_the_memory_that_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    kept, given_back = faults(environment(1, on_cpu=True)), faults(environment(1, on_cpu=False))
    assert kept < given_back / 20


def test_threads_wait_without_spinning_where_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert environment(2, on_cpu=True, crowded=True)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in environment(2, on_cpu=True)


def test_who_asks_for_no_gpu_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(1, on_cpu=True)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(1, on_cpu=False)
    monkeypatch.setattr("raykd.fleet.vllm_needs_gpu", lambda: True)
    assert "CUDA_VISIBLE_DEVICES" not in environment(1, on_cpu=True, starts_vllm=True)
    assert environment(1, on_cpu=True)["CUDA_VISIBLE_DEVICES"] == ""


def test_the_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not {"GLIBC_TUNABLES", "OMP_WAIT_POLICY"} & set(environment(1, on_cpu=True, crowded=True))


@pytest.fixture(scope="module")
def cluster() -> None:
    connect(Experiment(name="fleet", student=Model(path="x"), data=Pairs(path="x"), stages=(Stage(algorithm=SFT(), steps=1),)))


def replicas(count: int, poison: Path) -> list[Any]:
    """Actors that make blocks and load versions; the first that loads where there is ``poison`` dies of it."""

    class Replica:
        version = 0

        def apply(self, func: Any) -> Any:
            return func(self)

        def ping(self) -> str:
            return ray.get_runtime_context().get_node_id()

        def make(self, size: int) -> tuple[np.ndarray, int]:
            return np.arange(size), os.getpid()

        def read(self, block: np.ndarray) -> int:
            return int(block.sum())

        def generate(self, requests: list[Any], **_: Any) -> list[Any]:
            return [SimpleNamespace(version=self.version, tokens=(1,)) for _ in requests]

        def load(self, update: WeightUpdate, in_flight: bool) -> int:
            if poison.exists():
                poison.unlink()
                os._exit(1)
            self.version = update.version
            return update.version

    return [ray.remote(Replica).options(num_cpus=0, max_restarts=3).remote() for _ in range(count)]


def restarted(actor: Any) -> None:
    """Kill it, and wait until it is back."""
    before = ray.get(actor.make.remote(1))[1]
    ray.kill(actor, no_restart=False)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(RayActorError):
            if ray.get(actor.make.remote(1), timeout=60)[1] != before:
                return
        time.sleep(0.2)
    raise TimeoutError("the actor has not come back")


@pytest.mark.stack
def test_what_a_replica_made_outlives_it(cluster: None, tmp_path: Path) -> None:
    """Small and large: Ray keeps them in different places."""
    sizes = [10, 1_000_000]
    actors = replicas(2, tmp_path / "poison")
    made = Fleet("teacher", actors, 60.0).map("make", [{"size": size} for size in sizes], kept=True)
    assert len({process for _, process in made}) == 2
    for actor in actors:
        ray.kill(actor)
    (reader,) = replicas(1, tmp_path / "poison")
    for size, (block, _) in zip(sizes, made, strict=True):
        assert ray.get(reader.read.remote(block), timeout=60) == size * (size - 1) // 2


def ranks(count: int) -> list[Any]:
    """Actors that do what they are told."""

    class Rank:
        def act(self, what: str) -> str:
            if what == "sleep":
                time.sleep(60)
            elif what == "die":
                os._exit(1)
            elif what != "work":
                raise {"broken": DistBackendError, "wrong": ValueError}[what]("so it is")
            return what

    return [ray.remote(Rank).options(num_cpus=0).remote() for _ in range(count)]


@pytest.mark.stack
@pytest.mark.parametrize(
    ("does", "error", "says"),
    [
        ("die", ActorLost, "learner act: the actor died"),
        ("sleep", ActorLost, "learner act did not finish within 5 s"),
        ("broken", ActorLost, "learner act: .*so it is"),
        ("wrong", ValueError, "so it is"),
    ],
)
def test_a_rank_that_is_lost_is_told_from_one_that_refuses(cluster: None, does: str, error: type[Exception], says: str) -> None:
    gang = LearnerGang(ranks(2), 60.0)
    assert gang.all("act", "work") == ["work", "work"]
    gang.deadline_s = 5.0
    with pytest.raises(error, match=says) as failure:
        gang.each("act", ["work", does])
    assert isinstance(failure.value, ActorLost) == (error is ActorLost)
    assert any_dead(gang.ranks[:1]) is False
    if does != "sleep":
        assert any_dead(gang.ranks) == (does == "die")
        assert all_dead(gang.ranks[1:]) == (does == "die") and not all_dead(gang.ranks)


def update(version: int) -> WeightUpdate:
    return WeightUpdate(version=version, buckets=(), bytes=0, node=ray.get_runtime_context().get_node_id())


def workers_of(rollouts: Fleet) -> Workers:
    nobody: Any = None
    return Workers(learner=nobody, replay=None, usage=Usage(["rollout"]), rollouts=rollouts)


@pytest.mark.stack
def test_the_only_replica_may_die_of_new_weights_and_gets_them_again(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    poison = tmp_path / "poison"
    (actor,) = replicas(1, poison)
    workers = workers_of(Fleet("rollout", [actor], 60.0))
    poison.touch()
    with caplog.at_level("WARNING"):
        written = workers.generate(PROMPTS, update(3), samples=1, teacher_share=0.0, max_tokens=1, salt=0)
    assert [rollout.version for rollout in written] == [3, 3]
    assert "rollout replica 0 has died" in caplog.text and "rollout replicas 0 are back" in caplog.text


@pytest.mark.stack
def test_a_replica_that_came_back_while_nobody_asked_does_not_write_by_its_initial_weights(cluster: None, tmp_path: Path) -> None:
    actors = replicas(2, tmp_path / "poison")
    workers = workers_of(Fleet("rollout", actors, 60.0))
    newest = update(2)

    def write() -> list[int]:
        written = workers.generate(PROMPTS, newest, samples=2, teacher_share=0.0, max_tokens=1, salt=0)
        return [rollout.version for rollout in written]

    assert write() == [2, 2, 2, 2]
    restarted(actors[1])
    assert write() == [2, 2, 2, 2]


@pytest.mark.stack
def test_work_is_shared_out_among_those_that_are_left(cluster: None, tmp_path: Path) -> None:
    actors = replicas(3, tmp_path / "poison")
    fleet = Fleet("teacher", actors, 60.0)
    assert fleet.num_healthy == 3
    ray.kill(actors[1])
    assert len(fleet.map("make", [{"size": 1}] * fleet.num_healthy)) == 3
    assert fleet.num_healthy == 2
    assert len({process for _, process in fleet.map("make", [{"size": 1}] * 2)}) == 2
