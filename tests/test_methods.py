"""The methods that test_run.py leaves out, one stage each of one run on the real stack; then the run resumed in the middle."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from example_text import text
from rich.console import Console
from small_runs import small_run

from raykd.algorithms import AKL, GKD, OPD, AdaptiveSchedule, DistiLLM, DistiLLM2, MiniLLM, SeqKD
from raykd.algorithms.token_divergences import ReverseKL
from raykd.experiment import EvaluationConfig, Experiment, FunctionReward, Model, Optimiser, Stage
from raykd.run import run
from raykd.sources import Documents

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

BATCH = 8
SCHEDULE = AdaptiveSchedule(start=0.8, capacity=20, tolerance=0.0, generation="constant")
AHEAD_STEPS, IN_FLIGHT_STEPS, DISTILLM_STEPS, RESUME_AFTER = 5, 4, 10, 6
ALL_STEPS = 2 * 6 + AHEAD_STEPS + IN_FLIGHT_STEPS + DISTILLM_STEPS


WANTS_SHORT_RESPONSES = """
def rate(prompts, responses):
    return [-float(len(response)) for response in responses]
"""


@dataclass(frozen=True)
class Finished:
    folder: Path
    experiment: Experiment
    lines: list[dict[str, float]]


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    reward = tmp_path_factory.mktemp("reward") / "short.py"
    reward.write_text(WANTS_SHORT_RESPONSES)
    algorithms = [
        SeqKD(),
        DistiLLM2(epochs=2),
        OPD(),
        GKD(reward_weight=0.5),
        AKL(student_share=0.5),
        MiniLLM.lmops().model_copy(update={"rollouts": 16, "epochs": 1}),
    ]
    stages = [
        Stage(algorithm=algorithm, steps=2, batch_size=BATCH, optimiser=Optimiser(learning_rate=3e-3)) for algorithm in algorithms
    ]
    ahead = Stage(
        algorithm=GKD(divergence=ReverseKL(), importance_limit=1.5),
        steps=AHEAD_STEPS,
        batch_size=BATCH,
        max_staleness=2,
        optimiser=Optimiser(learning_rate=3e-3),
    )
    in_flight = Stage(
        algorithm=MiniLLM(rollouts=BATCH, epochs=1),
        steps=IN_FLIGHT_STEPS,
        batch_size=BATCH,
        max_staleness=2,
        in_flight=True,
        optimiser=Optimiser(learning_rate=3e-3),
    )
    last = Stage(
        algorithm=DistiLLM(schedule=SCHEDULE), steps=DISTILLM_STEPS, batch_size=BATCH, optimiser=Optimiser(learning_rate=3e-3)
    )
    experiment = small_run(
        teacher,
        tmp_path_factory.mktemp("runs"),
        name="methods",
        teacher=Model(path=str(teacher)),
        text=Documents(path=str(text().texts)),
        text_length=48,
        stages=(*stages, ahead, in_flight, last),
        reward=FunctionReward(name=f"{reward}:rate"),
        evaluation=EvaluationConfig(prompts=8, every=2),
        checkpoint_every=RESUME_AFTER,
    )
    folder = run(experiment, console=Console(quiet=True)).folder
    return Finished(folder, experiment, read(folder))


def steps(finished: Finished) -> list[dict[str, float]]:
    return [line for line in finished.lines if "loss" in line]


def test_every_step_of_every_method_leaves_finite_numbers_and_a_gradient(finished: Finished) -> None:
    assert [line["step"] for line in steps(finished)] == list(range(1, ALL_STEPS + 1))
    assert all(math.isfinite(value) for line in steps(finished) for value in line.values())
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in steps(finished))


def test_each_method_logs_what_is_its_own(finished: Finished) -> None:
    seq_kd, distillm2, opd, reward, akl, minillm = (steps(finished)[index] for index in range(0, 12, 2))
    assert seq_kd["sampled_forward_kl"] > 0 and seq_kd["dataset_share"] == 0
    assert distillm2["beta"] == pytest.approx(0.5) and "gap/teacher" in distillm2
    assert steps(finished)[3]["alpha_curriculum"] == 1 and distillm2["alpha"] == pytest.approx(0.1)
    assert opd["importance_weight"] == pytest.approx(1.0, abs=1e-3)
    assert reward["reward"] < 0
    assert akl["dataset_share"] == 0.5
    assert "kd/divergence" in minillm and minillm["advantage_std"] > 0
    assert 0.8 <= steps(finished)[-1]["student_share"] <= 1


def test_responses_written_ahead_are_as_old_as_allowed_and_weighed_by_it(finished: Finished) -> None:
    ahead = steps(finished)[12 : 12 + AHEAD_STEPS]
    assert [line["staleness"] for line in ahead] == [0, 1, 2, 2, 2]
    assert ahead[0]["logprob_mismatch"] < 1e-4 < 1e-3 < ahead[-1]["logprob_mismatch"]
    assert ahead[0]["importance_weight"] == pytest.approx(1.0, abs=1e-3)
    assert abs(ahead[-1]["importance_weight"] - 1.0) > 1e-3


def test_responses_written_in_flight_are_no_older_than_allowed(finished: Finished) -> None:
    in_flight = steps(finished)[12 + AHEAD_STEPS : 12 + AHEAD_STEPS + IN_FLIGHT_STEPS]
    assert all(line["staleness"] <= min(step, 2) for step, line in enumerate(in_flight))
    assert in_flight[0]["logprob_mismatch"] < 1e-4


def test_answers_to_held_out_prompts_are_kept_as_text(finished: Finished) -> None:
    samples = [json.loads(line) for line in (finished.folder / "samples.jsonl").read_text().splitlines()]
    steps_seen = {sample["step"] for sample in samples}
    assert {0, 2, ALL_STEPS} <= steps_seen
    assert len(samples) == 4 * len([line for line in finished.lines if "heldout/loss" in line])
    assert all(sample["prompt"].strip() and sample["reference"].strip() for sample in samples)
    assert all(sample.get("teacher", "").strip() for sample in samples if sample["step"] == 0)


def test_held_out_answers_are_measured_as_texts_and_a_report_is_written(finished: Finished) -> None:
    measured = [line for line in finished.lines if "heldout/loss" in line]
    assert all(0 < line["heldout/rouge_l"] < 100 and 0 < line["heldout/distinct_4"] <= 100 for line in measured)
    assert "Rouge-L" in (finished.folder / "report.html").read_text()


def test_distillm_learns_from_the_data_from_new_and_from_old_responses(finished: Finished) -> None:
    own = steps(finished)[-DISTILLM_STEPS:]
    assert {line["dataset_share"] for line in own} <= {0.0, 1.0}
    assert any("tokens/generate" in line for line in own)
    replayed = [line for line in own if line["dataset_share"] == 0 and "tokens/generate" not in line]
    assert replayed and all(line["replayed_share"] == 1 and "tokens/score" not in line for line in replayed)


def test_resumed_in_the_middle_of_the_schedule_it_goes_on_as_if_never_stopped(finished: Finished) -> None:
    newest = sorted((finished.folder / "checkpoints").iterdir())
    assert [path.name for path in newest[-2:]] == [f"step-{step:06d}" for step in (ALL_STEPS - 4, ALL_STEPS)]
    shutil.rmtree(newest[-1])
    run(finished.experiment, resume=finished.folder, console=Console(quiet=True))
    again = [line for line in read(finished.folder)[len(finished.lines) :] if "loss" in line]
    expected = steps(finished)[-(DISTILLM_STEPS - RESUME_AFTER) :]
    for name in ("step", "loss", "student_share", "dataset_share", "replayed_share", "staleness", "divergence"):
        assert [line[name] for line in again] == pytest.approx([line[name] for line in expected], abs=1e-5), name
