"""Engines that give their GPU memory back between phases: when they sleep, and that whatever is asked wakes them first.

vLLM's sleep needs a GPU: here its engine is one that writes down what it is told.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from raykd.algorithms import GKD
from raykd.experiment import EngineConfig, Experiment, Model, RolloutConfig, Stage, TeacherConfig
from raykd.rollout.config import EngineSettings
from raykd.rollout.engine_thread import EngineThread
from raykd.rollout.vllm_engine import VllmEngine
from raykd.rollout.worker import RolloutWorker
from raykd.sources import Pairs
from raykd.usage import Usage
from raykd.workers import Workers

DEADLINE_S = 60.0


class Recorder:
    """vLLM's engine as its thread uses it: a request takes two steps. Writes down every call and refuses work while it sleeps."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cache_in_use = self.out_of_memory = self._asleep = False
        self._steps: dict[str, int] = {}
        scheduler = SimpleNamespace(max_num_running_reqs=8, get_kv_cache_usage=lambda: 0.0)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler), shutdown=lambda: None)

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        assert not self._asleep
        self._steps[name] = 2
        self.calls.append("request")

    def step(self) -> list[Any]:
        assert not self._asleep
        self._steps = {name: left - 1 for name, left in self._steps.items()}
        done = [name for name, left in self._steps.items() if not left]
        self._steps = {name: left for name, left in self._steps.items() if left}
        self.calls += ["answer"] * len(done)
        logprobs = SimpleNamespace(start_indices=[0], end_indices=[1], logprobs=[-1.0])
        written = SimpleNamespace(token_ids=[7], logprobs=logprobs, finish_reason="stop")
        return [SimpleNamespace(request_id=name, outputs=[written]) for name in done]

    def abort_request(self, names: list[str]) -> None:
        self.calls.append("abort")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return not self.cache_in_use

    def sleep(self, level: int) -> None:
        assert not self._steps
        self._asleep = True
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        if self.out_of_memory:
            raise RuntimeError("CUDA out of memory")
        self._asleep = False
        self.calls.append("wake")


@pytest.fixture
def engine() -> Recorder:
    return Recorder()


@pytest.fixture
def thread(engine: Recorder) -> Iterator[EngineThread]:
    started = EngineThread(lambda: (engine, None))  # pyright: ignore[reportArgumentType]
    yield started
    started.close()


def ask(thread: EngineThread) -> Future[Any]:
    return thread.submit([1, 2], [(2, None)])  # pyright: ignore[reportArgumentType]


def done(*futures: Future[Any]) -> None:
    for future in futures:
        future.result(timeout=DEADLINE_S)


SLEEP = ["reset", "sleep 1"]


def test_it_sleeps_once_what_was_asked_before_is_answered_and_a_request_wakes_it(engine: Recorder, thread: EngineThread):
    done(ask(thread), ask(thread), thread.sleep(), ask(thread), thread.sleep())
    assert engine.calls[-7:] == [*SLEEP, "wake", "request", "answer", *SLEEP]
    assert engine.calls.count("request") == engine.calls.count("answer") == 3
    together = [ask(thread), thread.sleep(), ask(thread)]
    done(*together)
    assert engine.calls[-8:] == ["wake", "request", "answer", *SLEEP, "wake", "request", "answer"]


def test_new_weights_wake_it_and_the_end_of_a_session_does_not(engine: Recorder, thread: EngineThread):
    done(thread.sleep(), thread.end_session("gone"), thread.sleep())
    assert engine.calls == SLEEP, "sleeping twice is sleeping once"
    done(thread.update(lambda vllm: engine.calls.append("load"), in_flight=False))
    assert engine.calls == [*SLEEP, "wake", "load"]


def test_who_waits_learns_that_it_cannot_wake(engine: Recorder, thread: EngineThread):
    engine.out_of_memory = True
    done(thread.sleep())
    with pytest.raises(RuntimeError, match="has stopped: CUDA out of memory"):
        done(ask(thread))
    with pytest.raises(RuntimeError, match="start a new one"):
        ask(thread)


def test_it_does_not_sleep_over_a_cache_that_it_would_go_on_using(engine: Recorder, thread: EngineThread):
    engine.cache_in_use = True
    with pytest.raises(RuntimeError, match="cannot forget its KV cache"):
        done(thread.sleep())
    assert "sleep 1" not in engine.calls


def test_a_worker_sleeps_once_no_response_is_in_progress(thread: EngineThread, engine: Recorder):
    vllm_engine, worker = object.__new__(VllmEngine), object.__new__(RolloutWorker)
    vllm_engine._thread, vllm_engine._config = thread, EngineSettings(sleep=True, deadline_s=DEADLINE_S)
    worker.engine, worker._turn, worker._num_generating, worker._loading = vllm_engine, asyncio.Condition(), 0, False

    async def work() -> None:
        async with worker._generating():  # of a mixed response the teacher writes: no request is in the engine
            sleeping = asyncio.ensure_future(worker.sleep())
            await asyncio.sleep(0.05)
            assert not engine.calls
        await asyncio.wait_for(sleeping, DEADLINE_S)

    asyncio.run(work())
    assert engine.calls == SLEEP
    vllm_engine._config = EngineSettings()
    with pytest.raises(ValueError, match="set sleep in its settings"):
        asyncio.run(vllm_engine.sleep())


class Calls:
    """A fleet, or the learner's ranks, that write down what they are told."""

    def __init__(self, name: str, into: list[str]) -> None:
        self._name, self._into, self.actors, self.num_healthy = name, into, ["replica"], 1

    def broadcast(self, method: str, call: dict[str, Any]) -> list[Any]:
        self._into.append(f"{self._name} {method}")
        return []

    def map(self, method: str, calls: list[dict[str, Any]]) -> list[Any]:
        self._into.append(f"{self._name} {method}")
        return [[SimpleNamespace(tokens=(1,), version=0)] * len(call["requests"]) for call in calls]

    def all(self, method: str, *arguments: Any) -> list[Any]:
        return self.broadcast(method, {})


@pytest.mark.parametrize("sleeps", [True, False])
def test_learner_and_teachers_make_room_before_engines_wake(sleeps: bool):
    told: list[str] = []
    rollouts, teachers, learner = (cast("Any", Calls(name, told)) for name in ("rollout", "teacher", "learner"))
    workers = Workers(
        learner=learner,
        teachers=teachers,
        rollouts=rollouts,
        replay=None,
        usage=Usage(["rollout"]),
        sleepers=[rollouts] if sleeps else [],
    )
    prompt: Any = SimpleNamespace(id="p", tokens=(1,))
    workers.generate([prompt], None, samples=1, teacher_share=0.0, max_tokens=1, salt=0)
    workers.sleep()
    around = (["learner free_cache", "teacher free_cache"], ["rollout sleep"]) if sleeps else ([], [])
    assert told == [*around[0], "rollout generate", *around[1]]
    assert ("seconds/sleep" in workers.usage.take()) is sleeps


@pytest.mark.parametrize("replicas", [RolloutConfig, TeacherConfig])
def test_only_gpu_memory_can_be_given_back(replicas: type[RolloutConfig | TeacherConfig]):
    with pytest.raises(ValidationError, match="sleep gives GPU memory back, but gpus is 0"):
        replicas(sleep=True)
    replicas(sleep=True, gpus=0.5)
    with pytest.raises(ValidationError, match=r"tensor_parallel 2 takes as many GPUs, gpus gives a replica 0.5"):
        replicas(sleep=True, gpus=0.5, engine=EngineConfig(tensor_parallel=2))


@pytest.mark.parametrize("name", ["rollout", "teachers"])
def test_an_engine_that_is_asked_meanwhile_cannot_sleep(name: str):
    def experiment(max_staleness: int) -> Experiment:
        replicas = {"rollout": RolloutConfig, "teachers": TeacherConfig}[name](sleep=True, gpus=0.5)
        stages = Stage(algorithm=GKD(), steps=1), Stage(algorithm=GKD(), steps=1, max_staleness=max_staleness)
        models = {"student": Model(path="student"), "teacher": Model(path="teacher")}
        return Experiment.model_validate({"name": "x", "data": Pairs(path="x"), "stages": stages, name: replicas} | models)

    with pytest.raises(ValidationError, match=rf"{name}.sleep .* stages.1.max_staleness 2 .* set max_staleness to 0"):
        experiment(2)
    assert experiment(0).gpus() == 0.5
