"""The workers on real Ray, vLLM and DeepSpeed, two of each: they agree on every log-prob, and when a replica is killed in the
middle of a teacher-mixed batch nothing is lost, doubled or drawn anew."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from example_text import text, text_tokenizer
from ray.exceptions import RayActorError
from small_runs import MAX_PROMPT, MAX_RESPONSE, ON_CPU, prompts
from transformers import AutoModelForCausalLM

from raykd.actors import ModelFacts, within_reach
from raykd.algorithms import GKD, SFT, MiniLLM
from raykd.algorithms.base import Needs
from raykd.algorithms.token_divergences import ReverseKL
from raykd.experiment import Experiment, LearnerConfig, Model, Optimiser, RolloutConfig, Stage, TeacherConfig
from raykd.records import Rollout, Scores, Source
from raykd.run import connect
from raykd.sharing import Region
from raykd.sources import Documents, Pairs
from raykd.start import start_workers
from raykd.tokenise import eos_id
from raykd.weights import WeightUpdate, unpack, verify
from raykd.workers import Term, Workers, unscored

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

LONG, PROMPTS, SAMPLES = 96, 24, 3
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def workers(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two replicas of each fleet, two ranks, and a student that begins as its teacher."""
    experiment = Experiment(
        name="workers",
        teacher=Model(path=str(teacher)),
        student=Model(path=str(teacher)),
        data=Pairs(path=str(text().pairs)),
        text=Documents(path=str(text().texts)),
        stages=(Stage(algorithm=MiniLLM(rollouts=16), steps=1, batch_size=16),),
        max_prompt=MAX_PROMPT,
        max_response=LONG,
        rollout=RolloutConfig(replicas=2, engine=ON_CPU),
        teachers=TeacherConfig(replicas=2, dtype="float32", engine=ON_CPU),
        learner=LearnerConfig(ranks=2, dtype="float32", micro_batch=8, zero_stage=3),
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
    yield started
    started.close()


def learn(workers: Workers, rate: float = 1e-3) -> None:
    """A step on data."""
    rows = unscored([Rollout.reference(prompt) for prompt in prompts()[:16]])
    workers.step([Term(algorithm=SFT(), rows=rows)], rate)


def nll(workers: Workers, rollouts: list) -> float:
    """The learner's own -log q, mean over tokens."""
    return workers.evaluate([Term(algorithm=SFT(), rows=unscored(rollouts))])["loss"]


def test_rollout_learner_and_teacher_agree_on_the_same_ids(workers: Workers):
    """The teacher is the student's initial model: every log-prob has three independent witnesses."""
    for share in (0.0, 0.3):
        rollouts = workers.generate(
            prompts()[:24], workers.publish(), samples=2, teacher_share=share, max_tokens=MAX_RESPONSE, salt=1
        )
        assert {rollout.source for rollout in rollouts} == {Source.MIXED if share else Source.STUDENT}
        count = sum(len(rollout.tokens) for rollout in rollouts)
        engine = -sum(sum(rollout.student_logprobs or ()) for rollout in rollouts) / count
        rows = workers.score(rollouts, Needs.BOTH)
        blocks: dict[ray.ObjectRef, Scores] = {row.scores: ray.get(row.scores) for row in rows}
        for row in rows:  # token by token: the rollout engine against the teacher's prefill
            recorded = torch.tensor(row.rollout.student_logprobs)
            torch.testing.assert_close(recorded, blocks[row.scores].row(row.index).logprobs, atol=1e-4, rtol=1e-4)
        assert nll(workers, rollouts) == pytest.approx(engine, abs=1e-5)
        divergence = workers.evaluate([Term(algorithm=GKD(divergence=ReverseKL()), rows=rows)])["loss"]
        assert divergence == pytest.approx(0.0, abs=1e-6)


def test_after_a_step_the_published_weights_are_the_learners_and_the_engine_follows_them(workers: Workers, tmp_path: Path):
    for _ in range(3):
        learn(workers, 5e-3)
    rollouts = workers.generate(prompts()[:24], workers.publish(), samples=1, teacher_share=0.0, max_tokens=MAX_RESPONSE, salt=2)
    assert {rollout.version for rollout in rollouts} == {workers.version} == {3}
    count = sum(len(rollout.tokens) for rollout in rollouts)
    engine = -sum(sum(rollout.student_logprobs or ()) for rollout in rollouts) / count
    assert nll(workers, rollouts) == pytest.approx(engine, abs=1e-5)

    workers.save_student(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert workers._update is not None
    expected = {name: tensor for name, tensor in saved.state_dict().items() if name != "lm_head.weight"}  # tied
    carried = within_reach(workers._update, ["another node"])
    assert within_reach(workers._update, [workers._update.node]) is workers._update
    for buckets in (workers._update.buckets, ray.get(list(carried.buckets))):
        for bucket in buckets:
            verify(bucket)
        published = {name: tensor for bucket in buckets for name, tensor in unpack(bucket)}
        assert set(published) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(published[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert workers.rollouts is not None
    assert workers.rollouts.broadcast("load", {"update": carried, "in_flight": False}) == [3, 3]
    assert workers.rollouts.broadcast("gpus", {}) == [[workers.learner.all("gpu")[0]]] * len(workers.rollouts.actors)

    # Hugging Face agrees with what the engine recorded, token by token.
    for rollout in rollouts[:8]:
        ids = torch.tensor([rollout.prompt_tokens + rollout.tokens])
        logprobs = saved(ids).logits[0, len(rollout.prompt_tokens) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.student_logprobs), chosen, atol=1e-4, rtol=1e-4)


def write(workers: Workers) -> list[Rollout]:
    """The same batch every time: the same prompts, version and salt."""
    return workers.generate(prompts()[:PROMPTS], workers.publish(), samples=SAMPLES, teacher_share=0.3, max_tokens=LONG, salt=5)


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
    assert {rollout.source for rollout in undisturbed} == {Source.MIXED} and {r.version for r in undisturbed} == {workers.version}
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
    assert versions == [workers.version] * 2


def test_a_version_that_nobody_writes_by_gives_its_memory_to_the_next_and_a_replica_that_came_back_gets_that(workers: Workers):
    write(workers)
    before = place(workers.publish())
    killed: Any = workers.rollouts and workers.rollouts.actors[0]
    ray.kill(killed, no_restart=False)
    version = workers.version
    learn(workers)
    assert {rollout.version for rollout in write(workers)} == {workers.version} == {version + 1}
    assert place(workers.publish()) == before
    wait_until(lambda: is_alive(killed), "the restart")
    write(workers)
    assert look(killed, lambda self: self._worker.version) == version + 1


def test_when_every_replica_dies_they_come_back_with_the_newest_weights_and_no_prompt_is_lost(workers: Workers):
    assert workers.rollouts is not None
    for actor in workers.rollouts.actors:
        ray.kill(actor, no_restart=False)
    asked = prompts()[:24]
    rollouts = workers.generate(asked, workers.publish(), samples=1, teacher_share=0.0, max_tokens=MAX_RESPONSE, salt=3)
    assert [rollout.prompt_id for rollout in rollouts] == [prompt.id for prompt in asked]
    count = sum(len(rollout.tokens) for rollout in rollouts)
    engine = -sum(sum(rollout.student_logprobs or ()) for rollout in rollouts) / count
    assert nll(workers, rollouts) == pytest.approx(engine, abs=1e-5)


def test_two_phases_in_flight_lose_and_double_nothing_when_a_replica_is_killed_amid_new_weights(workers: Workers):
    workers.in_flight = True
    written: dict[int, list[Rollout]] = {}
    before = workers.version

    def write_phase(salt: int, update: WeightUpdate | None) -> threading.Thread:
        def generate() -> None:
            asked = {"samples": SAMPLES, "teacher_share": 0.3, "max_tokens": LONG, "salt": salt}
            written[salt] = workers.generate(prompts()[:PROMPTS], update, **asked)

        thread = threading.Thread(target=generate)
        thread.start()
        return thread

    assert workers.rollouts is not None
    doomed, other = workers.rollouts.actors
    try:
        first = write_phase(11, workers.publish())
        wait_until(lambda: look(doomed, VICTIMS["rollout"]) > 1, "a request in progress")
        learn(workers)
        second = write_phase(12, workers.publish())
        wait_until(lambda: look(other, lambda self: self._worker.version) == before + 1, "new weights")
        assert first.is_alive(), "the first phase was written before the new weights came"
        ray.kill(doomed, no_restart=False)
        for thread in (first, second):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
    finally:
        workers.in_flight = False
    expected = [(prompt.id, sample) for prompt in prompts()[:PROMPTS] for sample in range(SAMPLES)]
    for rollouts in written.values():
        assert [(rollout.prompt_id, rollout.sample) for rollout in rollouts] == expected, "each once, in the order asked"
        assert all(len(rollout.student_logprobs or ()) == len(rollout.tokens) for rollout in rollouts)
    assert {rollout.version for rollout in written[11]} == {before, before + 1}, "what the dead one was asked is written anew"
    assert {rollout.version for rollout in written[12]} == {before + 1}


def place(update: WeightUpdate | None) -> Region:
    assert update is not None
    return update.buckets[0].place
