"""The main job on the real stack: Ray, vLLM, DeepSpeed; two replicas of each fleet, two learner ranks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from example_text import text
from rich.console import Console
from small_runs import ON_CPU, prompts, small_run
from transformers import AutoModelForCausalLM

from raykd.algorithms import GKD, KD, SFT, MiniLLM
from raykd.algorithms.token_divergences import ReverseKL
from raykd.experiment import (
    EvaluationConfig,
    Experiment,
    LearnerConfig,
    LoRA,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
    TrackingConfig,
)
from raykd.run import Result, run
from raykd.run_directory import load_experiment
from raykd.sources import Documents, Pairs

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


def experiment(teacher: Path, runs: Path) -> Experiment:
    fast = Optimiser(learning_rate=5e-3)
    return small_run(
        teacher,
        runs,
        name="end-to-end",
        teacher=Model(path=str(teacher)),
        text=Documents(path=str(text().texts)),
        text_length=48,
        stages=(
            Stage(algorithm=SFT(), steps=12, batch_size=16, optimiser=fast),
            Stage(algorithm=KD(), steps=4, batch_size=16, optimiser=fast),
            Stage(algorithm=GKD(divergence=ReverseKL()), steps=4, batch_size=16, samples_per_prompt=2, optimiser=fast),
            Stage(algorithm=MiniLLM(rollouts=32, epochs=2), steps=8, batch_size=16, optimiser=fast),
        ),
        rollout=RolloutConfig(replicas=2, engine=ON_CPU),
        teachers=TeacherConfig(replicas=2, dtype="float32", engine=ON_CPU),
        learner=LearnerConfig(ranks=2, dtype="float32", micro_batch=8, zero_stage=2),
        evaluation=EvaluationConfig(prompts=24),
        tracking=TrackingConfig(),
    )


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One whole run: four stages, four algorithms, the same loop, fleets and learner."""
    return run(experiment(teacher, tmp_path_factory.mktemp("runs")), console=Console(quiet=True))


def lines(result: Result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_student_improves(finished: Result):
    assert finished.after["reverse_kl"] < 0.8 * finished.before["reverse_kl"]
    assert finished.after["forward_kl"] < 0.8 * finished.before["forward_kl"]
    assert finished.after["loss"] < finished.before["loss"] - 0.5
    assert finished.after["response_length"] > 3


def test_every_step_leaves_a_line_of_finite_numbers(finished: Result):
    steps = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 29))
    assert all(math.isfinite(value) for line in steps for value in line.values())
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in steps)


def test_only_the_sampling_stages_sample_and_a_phase_is_written_before_it_is_learned_from(finished: Result):
    steps = {line["step"]: line for line in lines(finished) if "loss" in line}
    assert [step for step, line in steps.items() if "tokens/generate" in line] == [17, 18, 19, 20, 21, 25]
    assert [steps[step]["staleness"] for step in (17, 20, 21, 22, 23, 24, 25)] == [0, 0, 0, 1, 2, 3, 0]
    assert [steps[step]["dataset_share"] for step in (1, 13, 17, 21)] == [1, 1, 0, 0]


def test_teacher_mixed_responses_are_weighted_by_their_law(finished: Result):
    first = next(line for line in lines(finished) if line["step"] == 21 and "loss" in line)
    # On the policy that wrote them, E[q / mixture] = 1 exactly, and the weight never exceeds 1 / (1 - 0.2).
    assert first["importance_weight"] == pytest.approx(1.0, abs=0.1)
    assert first["importance_weight_squared"] > first["importance_weight"] ** 2 + 1e-4


def test_the_run_directory_holds_everything(finished: Result):
    described = json.loads((finished.folder / "experiment.json").read_text())
    assert Experiment.model_validate(described["experiment"]).name == "end-to-end"
    assert described["libraries"]["ray"] and described["libraries"]["torch"]
    assert list(finished.folder.glob("wandb/offline-run-*/*.wandb"))
    newest = sorted((finished.folder / "checkpoints").iterdir())[-1]
    assert newest.name == "step-000028" and (newest / "driver.json").is_file() and (newest / "replay.pkl").is_file()


def test_transformers_loads_the_student(finished: Result):
    model = AutoModelForCausalLM.from_pretrained(finished.student)
    given = [prompt for prompt in prompts() if prompt.response][:8]
    losses = []
    for prompt in given:
        ids = torch.tensor([prompt.tokens + prompt.response])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-logprobs[len(prompt.tokens) - 1 :].gather(1, ids[0, len(prompt.tokens) :, None]).mean())
    assert torch.stack(losses).mean() < finished.before["loss"] - 0.5


def test_a_finished_run_is_resumed_at_its_end_and_a_second_run_gets_its_own_directory(finished: Result, teacher: Path):
    short = experiment(teacher, finished.folder.parent).model_copy(
        update={
            "teacher": None,
            "stages": (Stage(algorithm=SFT(), steps=2, batch_size=16),) * 2,
            "learner": LearnerConfig(dtype="float32"),
            "evaluation": EvaluationConfig(prompts=0),
            "tracking": TrackingConfig(wandb=False),
        }
    )
    console = Console(quiet=True)
    whole = run(short, console=console)
    assert whole.folder.name == "end-to-end-2"
    # Interrupted after the first stage: the checkpoint of the second is taken away, then the run goes on.
    newest = sorted((whole.folder / "checkpoints").iterdir())[-1]
    newest.rename(whole.folder / "gone")
    before = [line["loss"] for line in lines(whole)]
    run(short, resume=whole.folder, console=console)
    assert [line["loss"] for line in lines(whole)][4:] == pytest.approx(before[2:], abs=1e-6)


def test_a_resumed_run_takes_other_settings_and_keeps_them(teacher: Path, tmp_path: Path):
    impatient = Optimiser(gradient_limit=1e-6, max_skipped=3)
    first = experiment(teacher, tmp_path).model_copy(
        update={
            "teacher": None,
            "stages": (Stage(algorithm=SFT(), steps=9, batch_size=8, optimiser=impatient),),
            "learner": LearnerConfig(dtype="float32"),
            "evaluation": EvaluationConfig(prompts=0),
            "tracking": TrackingConfig(wandb=False),
            "checkpoint_every": 2,
        }
    )
    console = Console(quiet=True)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were skipped.*raise gradient_limit"):
        run(first, console=console)
    folder = tmp_path / "end-to-end"
    patient = first.model_copy(update={"stages": (Stage(algorithm=SFT(), steps=4, batch_size=16, optimiser=Optimiser()),)})
    result = run(patient, resume=folder, console=console)
    learned = {line["step"]: line for line in lines(result)}
    assert [learned[step]["skipped"] for step in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert learned[3]["tokens/learn"] > 1.5 * learned[2]["tokens/learn"]
    assert max(learned[step]["waiting/learner"] for step in (1, 3)) < 2, "starting the workers is part of no step"
    assert load_experiment(folder) == patient
    adapted = patient.model_copy(update={"learner": LearnerConfig(dtype="float32", lora=LoRA(rank=2))})
    with pytest.raises(
        ValueError, match=f"the checkpoints of run {folder} are of a learner with lora .*; resume it with the same"
    ):
        run(adapted, resume=folder, console=console)
    assert load_experiment(folder) == patient, "what was refused does not stay"
    again = patient.model_copy(update={"stages": first.stages})
    with pytest.raises(ValueError, match=f"stages.0 of run {folder} is over and cannot change any more"):
        run(again, resume=folder, console=console)
    shorter = patient.model_copy(update={"data": Pairs(path=str(text().pairs), limit=20)})
    with pytest.raises(ValueError, match=r"the run learned from .* rows, now there are 20"):
        run(shorter, resume=folder, console=console)


def test_a_run_goes_on_with_other_ranks_as_if_it_had_begun_with_them(teacher: Path, tmp_path: Path):
    """One of them writes the checkpoint, two under ZeRO-3 go on, and one again."""
    whole = experiment(teacher, tmp_path).model_copy(
        update={
            "teacher": None,
            "stages": (Stage(algorithm=SFT(), steps=9, batch_size=16, optimiser=Optimiser(learning_rate=5e-3)),),
            "learner": LearnerConfig(dtype="float32"),
            "evaluation": EvaluationConfig(prompts=0),
            "tracking": TrackingConfig(wandb=False),
            "checkpoint_every": 3,
            "checkpoints_kept": None,
        }
    )
    console = Console(quiet=True)
    result = run(whole, console=console)
    expected = [line["loss"] for line in lines(result)]

    def go_on_after(step: int, learner: LearnerConfig) -> None:
        for folder in (result.folder / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)
        run(whole.model_copy(update={"learner": learner}), resume=result.folder, console=console)

    go_on_after(3, LearnerConfig(dtype="float32", ranks=2, zero_stage=3))
    go_on_after(6, LearnerConfig(dtype="float32", ranks=1, zero_stage=1))
    assert [line["loss"] for line in lines(result)] == pytest.approx([*expected, *expected[3:], *expected[6:]], abs=1e-5)


def test_a_stage_hands_on_its_best_weights(teacher: Path, tmp_path: Path):
    """A rate that destroys the student after it has learned: what goes on is what was best, and the engine follows."""
    slow, wild = Optimiser(learning_rate=5e-3), Optimiser(learning_rate=1.0, warmup_steps=50)
    stages = (
        Stage(algorithm=SFT(), steps=4, batch_size=16, optimiser=slow),
        Stage(algorithm=SFT(), steps=4, batch_size=16, optimiser=wild, keep="loss"),
        Stage(algorithm=GKD(divergence=ReverseKL()), steps=1, batch_size=16, optimiser=slow),
    )
    changes = {
        "stages": stages,
        "rollout": RolloutConfig(engine=ON_CPU),
        "teachers": TeacherConfig(dtype="float32", engine=ON_CPU),
        "learner": LearnerConfig(ranks=2, dtype="float32", zero_stage=2),
        "evaluation": EvaluationConfig(prompts=24, every=1),
        "tracking": TrackingConfig(wandb=False),
    }
    result = run(experiment(teacher, tmp_path).model_copy(update=changes), console=Console(quiet=True))
    held_out = {line["step"]: line["heldout/loss"] for line in lines(result) if "heldout/loss" in line}
    best = min(range(5, 9), key=lambda step: held_out[step])
    assert not list((result.folder / "checkpoints").glob("best-*")), "the last stage keeps none"
    assert best < 8 and held_out[8] > held_out[best] + 0.1, "the rate destroys nothing"
    (step,) = [line for line in lines(result) if line["step"] == 9 and "loss" in line]
    assert step["logprob_mismatch"] < 1e-4  # the engine wrote with what the learner went back to
    assert step["nll"] < held_out[8]
    assert held_out[9] == pytest.approx(held_out[best], abs=0.1)
