"""Impossible settings cannot be written, and an experiment survives JSON."""

import pytest
from pydantic import ValidationError

from raykd.algorithms import GKD, KD, SFT, DistiLLM, DistiLLM2, MiniLLM
from raykd.experiment import (
    EngineConfig,
    EvaluationConfig,
    Experiment,
    LearnerConfig,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
)
from raykd.sources import Documents, Pairs
from raykd.train import learning_rate

STUDENT, TEACHER = Model(path="student"), Model(path="teacher")


def experiment(**changes: object) -> Experiment:
    fields = {"name": "x", "student": STUDENT, "data": Pairs(path="x.jsonl"), "stages": (Stage(algorithm=SFT(), steps=1),)}
    return Experiment.model_validate(fields | changes)


def test_json_keeps_every_field():
    stages = (Stage(algorithm=SFT(), steps=3), Stage(algorithm=MiniLLM(teacher_share=0.1), steps=4))
    original = experiment(teacher=TEACHER, text=Documents(path="t.txt"), stages=stages)
    assert Experiment.model_validate_json(original.model_dump_json()) == original


TEXT = Documents(path="t.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (Stage(algorithm=KD(), steps=1),)}, "stages.0: KD needs a teacher"),
        ({"stages": (Stage(algorithm=MiniLLM(), steps=1),), "teacher": TEACHER}, "text is not set"),
        ({"data": Pairs(path="x", response=None)}, "data.response is not set"),
        (
            {"stages": (Stage(algorithm=MiniLLM.lmops(), steps=1),), "teacher": TEACHER, "text": TEXT, "max_response": 512},
            "whitens over 256 positions a response, but max_response is 512",
        ),
        ({"learner": LearnerConfig(ranks=65)}, "learner.ranks 65 is more than the smallest batch_size"),
        ({"stages": ()}, "at least 1 item"),
        ({"name": "../x"}, "name"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        experiment(**changes)


@pytest.mark.parametrize(
    ("keep", "changes", "message"),
    [
        (
            "loss",
            {"evaluation": EvaluationConfig(every=0)},
            "stages.0 keeps the best weights by the held-out loss.*evaluation.every is 0",
        ),
        ("rouge_l", {"evaluation": EvaluationConfig(every=5, prompts=0)}, "evaluation.prompts 0"),
        ("reverse_kl", {"evaluation": EvaluationConfig(every=5)}, "teacher is not set"),
        (
            "rouge_l",
            {"evaluation": EvaluationConfig(every=5), "data": Pairs(path="x", response=None)},
            "data.response is not set",
        ),
    ],
)
def test_weights_are_kept_by_what_is_measured(keep: str, changes: dict[str, object], message: str):
    algorithm = GKD() if "data" in changes else SFT()
    stages = (Stage.model_validate({"algorithm": algorithm, "steps": 1, "keep": keep}),)
    with pytest.raises(ValidationError, match=message):
        experiment(stages=stages, **({"teacher": TEACHER} if "data" in changes else {}), **changes)


def test_a_schedule_by_the_held_out_loss_has_one():
    stages = (Stage(algorithm=DistiLLM(), steps=1),)
    with pytest.raises(
        ValidationError, match=r"stages.0: DistiLLM raises its .* held-out loss, but .* or set schedule.step to 0"
    ):
        experiment(stages=stages, teacher=TEACHER)
    experiment(stages=stages, teacher=TEACHER, evaluation=EvaluationConfig(every=5))


@pytest.mark.parametrize(("batch_size", "samples"), [(12, 4), (5, 1), (32, 32)])
def test_prompts_that_cannot_be_halved_are_refused(batch_size: int, samples: int):
    algorithm = DistiLLM2(responses=batch_size)
    stages = (Stage(algorithm=algorithm, steps=1, batch_size=batch_size, samples_per_prompt=samples),)
    with pytest.raises(ValidationError, match=rf"half of {batch_size} responses a phase is no whole number of prompts"):
        experiment(stages=stages, teacher=TEACHER)


def test_an_engine_is_started_where_answers_are_measured():
    every = EvaluationConfig(every=5)
    assert experiment(stages=(Stage(algorithm=SFT(), steps=1, keep="rouge_l"),), evaluation=every).writes_responses
    assert not experiment(stages=(Stage(algorithm=SFT(), steps=1, keep="loss"),), evaluation=every).writes_responses


def test_rollouts_that_would_never_be_learned_from_are_refused():
    with pytest.raises(ValidationError, match="no multiple of batch_size"):
        Stage(algorithm=MiniLLM(rollouts=100), steps=1, batch_size=64)
    with pytest.raises(ValidationError, match="samples_per_prompt 3 does not divide"):
        Stage(algorithm=GKD(), steps=1, batch_size=8, samples_per_prompt=3)


@pytest.mark.parametrize("replicas", [RolloutConfig, TeacherConfig])
def test_a_tensor_parallel_engine_has_a_gpu_for_each_process(replicas: type[RolloutConfig | TeacherConfig]):
    with pytest.raises(ValidationError, match=r"engine.tensor_parallel 4 takes as many GPUs, gpus gives a replica 2"):
        replicas(gpus=2, engine=EngineConfig(tensor_parallel=4))
    replicas(engine=EngineConfig(tensor_parallel=2))  # processes on a CPU


def test_two_engines_of_a_teacher_fit_on_its_gpu():
    mixes = (Stage(algorithm=MiniLLM(text_coefficient=0), steps=1, batch_size=256),)
    half = TeacherConfig(backend="vllm", gpus=1)
    with pytest.raises(ValidationError, match=r"teachers.engine.memory 0.5 is taken twice.*lower it to 0.45"):
        experiment(teacher=TEACHER, stages=mixes, teachers=half)
    experiment(teacher=TEACHER, stages=(Stage(algorithm=KD(), steps=1),), teachers=half)
    experiment(teacher=TEACHER, stages=mixes, teachers=TeacherConfig(backend="vllm", gpus=1, engine=EngineConfig(memory=0.4)))


def test_the_gpus_of_all_fleets_add_up():
    asked = experiment(
        teacher=TEACHER,
        rollout=RolloutConfig(replicas=2, gpus=1),
        teachers=TeacherConfig(replicas=3, gpus=2),
        learner=LearnerConfig(ranks=4, gpus=1),
    )
    assert asked.gpus() == 2 + 6 + 4
    shares = experiment(
        teacher=TEACHER,
        rollout=RolloutConfig(replicas=3, gpus=0.2),
        teachers=TeacherConfig(gpus=0.3),
        learner=LearnerConfig(gpus=0.1),
    )
    assert shares.gpus() == 1, "not a little more, as the floating-point sum"


def test_learner_ranks_do_not_share_a_gpu():
    with pytest.raises(ValidationError, match=r"two of 2 ranks with gpus 0\.5 could be given the same GPU"):
        LearnerConfig(ranks=2, gpus=0.5)
    LearnerConfig(ranks=2, gpus=0.6)
    LearnerConfig(gpus=0.5)


def test_the_threads_of_overlapping_work_add_up():
    def threads(algorithm: GKD | MiniLLM | SFT, max_staleness: int) -> int:
        return experiment(
            teacher=TEACHER,
            text=Documents(path="t.txt"),
            stages=(Stage(algorithm=algorithm, steps=1, max_staleness=max_staleness),),
            rollout=RolloutConfig(replicas=2, engine=EngineConfig(threads=3)),
            teachers=TeacherConfig(replicas=2, threads=5, engine=EngineConfig(threads=7)),
            learner=LearnerConfig(ranks=4, threads=2),
            evaluation=EvaluationConfig(prompts=0),
        ).threads()

    assert threads(GKD(), 0) == 2 * 5
    assert threads(GKD(), 1) == 2 * 3 + 2 * 5 + 4 * 2
    assert threads(MiniLLM(teacher_share=0.2), 0) == 2 * 3 + 2 * 7
    assert threads(SFT(), 1) == 2 * 5 + 4 * 2


def test_the_learning_rate_follows_its_schedule():
    cosine = Optimiser(learning_rate=1.0, learning_rate_min=0.2, schedule="cosine", warmup_steps=2)
    assert [learning_rate(cosine, step, 6) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.88284271, 0.6, 0.31715729])
    linear = Optimiser(learning_rate=1.0, schedule="linear")
    assert [learning_rate(linear, step, 4) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert learning_rate(Optimiser(learning_rate=0.3), 17, 20) == 0.3
