"""Replicas killed in the middle of a teacher-mixed batch, on real Ray and vLLM: nothing is lost, doubled or drawn anew."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from example_text import text, text_tokenizer
from ray.exceptions import RayActorError
from small_runs import MAX_PROMPT, ON_CPU, prompts

from raykd.actors import ModelFacts
from raykd.algorithms import GKD, SFT, MiniLLM
from raykd.algorithms.base import Needs
from raykd.experiment import Experiment, LearnerConfig, Model, Optimiser, RolloutConfig, Stage, TeacherConfig
from raykd.prompts import eos_id
from raykd.records import Rollout, Source
from raykd.run import connect
from raykd.sharing import Region
from raykd.sources import Documents, Pairs
from raykd.start import start_workers
from raykd.weights import WeightUpdate
from raykd.workers import Term, Workers, unscored

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

MAX_RESPONSE, PROMPTS, SAMPLES = 96, 24, 3
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def workers(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two replicas of each fleet, and a student that began as its teacher and has taken two steps."""
    experiment = Experiment(
        name="killed",
        teacher=Model(path=str(teacher)),
        student=Model(path=str(teacher)),
        data=Pairs(path=str(text().pairs)),
        text=Documents(path=str(text().texts)),
        stages=(Stage(algorithm=MiniLLM(rollouts=16), steps=1, batch_size=16),),
        max_prompt=MAX_PROMPT,
        max_response=MAX_RESPONSE,
        rollout=RolloutConfig(replicas=2, engine=ON_CPU),
        teachers=TeacherConfig(replicas=2, dtype="float32", engine=ON_CPU),
        learner=LearnerConfig(dtype="float32"),
        runs=tmp_path_factory.mktemp("runs"),
    )
    connect(experiment)
    tokenizer = text_tokenizer()
    facts = ModelFacts(
        student=str(teacher),
        teacher=str(teacher),
        vocab_size=len(tokenizer),
        eos_ids=(eos_id(tokenizer),),
        max_length=experiment.max_length,
        seed=0,
    )
    started = start_workers(experiment, facts)
    started.begin(Optimiser(learning_rate=1e-3))
    for _ in range(2):
        learn(started)
    yield started
    started.close()


def learn(workers: Workers) -> None:
    """A step on data."""
    rows = unscored([Rollout.reference(prompt) for prompt in prompts()[:16]])
    workers.step([Term(algorithm=SFT(), rows=rows)], 1e-3)


def write(workers: Workers) -> list[Rollout]:
    """The same batch every time: the same prompts, version and salt."""
    return workers.generate(
        prompts()[:PROMPTS], workers.publish(), samples=SAMPLES, teacher_share=0.3, max_tokens=MAX_RESPONSE, salt=5
    )


def look(actor: Any, at: Callable[[Any], Any]) -> Any:
    return ray.get(actor.apply.remote(at), timeout=DEADLINE_S)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} has not come true within {DEADLINE_S:g} s"
        time.sleep(0.005)


def is_alive(actor: Any) -> bool:
    try:
        return look(actor, lambda _: True)
    except RayActorError:
        time.sleep(0.5)
        return False


VICTIMS = {
    "rollout": lambda self: len(self._worker.engine._thread._running),
    "teacher": lambda self: len(self._engine._thread._running),
}
"""For an actor of each fleet, how many requests its engine is writing."""


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_replica_killed_in_the_middle_of_a_mixed_batch_loses_and_doubles_nothing(workers: Workers, victim: str):
    undisturbed = write(workers)
    assert {rollout.source for rollout in undisturbed} == {Source.MIXED} and {r.version for r in undisturbed} == {2}
    assert workers.rollouts is not None and workers.teachers is not None
    killed: Any = (workers.rollouts if victim == "rollout" else workers.teachers).actors[0]
    scored = [Term(algorithm=GKD(), rows=workers.score(undisturbed, Needs.DISTRIBUTION))]
    divergence = workers.evaluate(scored)
    process = look(killed, lambda _: __import__("os").getpid())
    written: list[Rollout] = []
    writing = threading.Thread(target=lambda: written.extend(write(workers)))
    writing.start()
    wait_until(lambda: look(killed, VICTIMS[victim]) > 1, "a request in progress")
    ray.kill(killed, no_restart=False)
    assert writing.is_alive(), "the batch was complete before the kill"
    writing.join(DEADLINE_S)
    assert not writing.is_alive()

    expected = [(prompt.id, sample) for prompt in prompts()[:PROMPTS] for sample in range(SAMPLES)]
    assert [(rollout.prompt_id, rollout.sample) for rollout in written] == expected, "each once, in the order asked"
    assert [r.tokens for r in written] == [r.tokens for r in undisturbed], "seeds know nothing of replicas"
    assert [r.finished for r in written] == [r.finished for r in undisturbed]

    assert workers.evaluate(scored) == divergence, "scores outlive the teacher that made them"

    wait_until(lambda: is_alive(killed), "the restart")
    assert look(killed, lambda _: __import__("os").getpid()) != process
    assert [r.tokens for r in write(workers)] == [r.tokens for r in undisturbed], "the one that came back helps again"
    versions = [look(actor, lambda self: self._worker.version) for actor in workers.rollouts.actors]
    assert versions == [2, 2]


def test_a_version_that_nobody_writes_by_gives_its_memory_to_the_next_and_a_replica_that_came_back_gets_that(workers: Workers):
    write(workers)
    before = place(workers.publish())
    killed: Any = workers.rollouts and workers.rollouts.actors[0]
    ray.kill(killed, no_restart=False)
    learn(workers)
    assert {rollout.version for rollout in write(workers)} == {workers.version} == {3}
    assert place(workers.publish()) == before
    wait_until(lambda: is_alive(killed), "the restart")
    write(workers)
    assert look(killed, lambda self: self._worker.version) == 3


def place(update: WeightUpdate | None) -> Region:
    assert update is not None
    return update.buckets[0].place
