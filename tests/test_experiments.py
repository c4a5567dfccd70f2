"""Every experiment runs as a user would start it: the files in experiments/, and a Ray job with token authentication."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import get_args

import pytest
import spoken_dates

from raykd.algorithms import AnyAlgorithm
from raykd.experiment import Experiment

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def command(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"} | environment
    return subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)


def test_the_language_of_dates_is_right():
    day = date(1905, 11, 3)
    assert spoken_dates.answers(day) == [
        "the third of November, 1905",
        "in 1905, on the third of November",
        "the third of November, nineteen oh five",
        "in nineteen oh five, on the third of November",
        "November the third, 1905",
        "in 1905, on November the third",
        "November the third, nineteen oh five",
        "in nineteen oh five, on November the third",
    ]
    assert (
        spoken_dates.ordinal(30) == "thirtieth"
        and spoken_dates.ordinal(21) == "twenty-first"
        and spoken_dates.ordinal(12) == "twelfth"
    )
    assert spoken_dates.two_digits(0) == "hundred" and spoken_dates.two_digits(42) == "forty-two"
    assert all(spoken_dates.is_right(*pair) for pair in spoken_dates.sample(200, seed=1))
    assert not spoken_dates.is_right("1905-11-03\n", "the fourth of November, 1905")


STORIES = sorted(path.stem for path in (ROOT / "experiments").glob("stories_*.py"))
PAPER_ROWS = sorted(path.stem for path in (ROOT / "experiments").glob("*_*.py") if "from dolly import" in path.read_text())


def experiments(name: str) -> dict[str, Experiment]:
    """The experiment of a file, and the same at its other scales."""
    module = importlib.import_module(name)
    return {"": module.EXPERIMENT} | {scale: make() for scale, make in getattr(module, "SCALES", {}).items()}


@pytest.mark.parametrize("name", [*STORIES, *PAPER_ROWS])
def test_an_experiment_is_a_value_that_survives_json(name: str):
    for experiment in experiments(name).values():
        assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_every_algorithm_has_a_file_on_the_stories_pair():
    algorithms = get_args(get_args(AnyAlgorithm)[0])
    shown = {type(stage.algorithm) for name in STORIES for e in experiments(name).values() for stage in e.stages}
    assert shown == set(algorithms)


def test_every_method_on_the_stories_pair_has_as_many_steps():
    assert {sum(stage.steps for stage in e.stages) for name in STORIES for e in experiments(name).values()} == {496}


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_a_paper_row_fills_half_a_node_or_a_node(name: str):
    gpus = {scale: experiment.gpus() for scale, experiment in experiments(name).items() if scale != "tiny"}
    assert set(gpus.values()) <= {4, 8} and len(set(gpus.values())) == 1, gpus


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_the_runs_of_a_paper_row_have_names_of_their_own(name: str):
    names = [experiment.name for scale, experiment in experiments(name).items() if scale]
    assert len(set(names)) == len(names)


def test_a_teacher_to_be_made_first_is_where_its_fine_tuning_leaves_it():
    made = {str(e.runs.absolute() / e.name / "student") for e in experiments("sft_dolly").values()}
    teachers = {e.teacher.path for name in PAPER_ROWS for e in experiments(name).values() if e.teacher}
    waiting = {teacher for teacher in teachers if teacher.endswith("/student")}
    assert waiting and waiting <= made


def test_the_13b_layout_is_the_one_its_docstring_draws():
    experiment = importlib.import_module("minillm_llama13b").EXPERIMENT
    layout = (experiment.learner.ranks, experiment.teachers.replicas, experiment.rollout.replicas, experiment.gpus())
    assert layout == (4, 2, 2, 8)


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of its own, as `ray start --head` makes it, with token authentication."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text("0123456789abcdef" * 4)
    ports = ["--port=46379", "--dashboard-port=48265", "--dashboard-agent-listen-port=48365", "--ray-client-server-port=46001"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    host = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-gpus=0", "--block", "--disable-usage-stats"]
    env = os.environ | token | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        head = subprocess.Popen([BIN / "ray", "start", "--head", *ports, *host], env=env, stdout=log, stderr=log, cwd=folder)
    yield token | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:48265", "RAY_ADDRESS": "http://127.0.0.1:48265"}
    head.terminate()
    head.wait(60)


@pytest.mark.stack
@pytest.mark.timeout(600)
def test_a_run_is_a_plain_ray_job_with_its_own_layout_whose_failure_is_an_exit_code(ray_head: dict[str, str], tmp_path: Path):
    env_vars = {"RAYKD_RUNS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    script = ["--", "python", "experiments/minillm_llama13b.py", "--scale", "tiny"]

    def submit(*options: str, **changes: str) -> subprocess.CompletedProcess[str]:
        job = ["ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": env_vars})]
        return command(*job, *script, *options, environment=ray_head | changes)

    wrong = submit("--stepps", "1")
    deadline = time.monotonic() + 90
    while "Unrecognized" not in wrong.stdout + wrong.stderr and time.monotonic() < deadline:  # until the head accepts jobs
        time.sleep(2)
        wrong = submit("--stepps", "1")
    assert wrong.returncode != 0 and "--stepps" in wrong.stdout + wrong.stderr

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held out after step 6" in done.stdout
    run = tmp_path / "minillm-llama-tiny"
    described = json.loads((run / "experiment.json").read_text())["experiment"]
    assert (described["learner"]["ranks"], described["learner"]["zero_stage"]) == (4, 3)
    assert (described["teachers"]["replicas"], described["rollout"]["replicas"]) == (2, 2)
    assert max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()) == 6
    assert (run / "student" / "model.safetensors").is_file()

    refused = submit(RAY_AUTH_TOKEN_PATH=os.devnull)
    assert refused.returncode != 0 and "token" in (refused.stdout + refused.stderr).lower()


@pytest.mark.stack
@pytest.mark.timeout(600)
def test_stories_minillm_distils_a_real_pretrained_model(data: Path, tmp_path: Path):
    few = ["--stages.0.steps", "20", "--stages.1.steps", "4", "--evaluation.prompts", "16"]
    environment = {"RAYKD_DATA": str(data), "RAYKD_RUNS": str(tmp_path)}
    done = command(sys.executable, "experiments/stories_minillm.py", *few, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "stories-minillm" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "heldout/loss" in line]
    assert [line["step"] for line in measured] == [0, 20, 24]
    assert measured[-1]["heldout/forward_kl"] < measured[0]["heldout/forward_kl"] - 0.5
