"""The run directory and what ``experiment.json`` says there; the checkpoints are those of checkpoints.py."""

import json
from pathlib import Path

from raykd.checkpoints import Checkpoint, newest_checkpoint
from raykd.experiment import Experiment
from raykd.provenance import revision, versions
from raykd.sources import Documents


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


def newest_run(experiment: Experiment) -> Path | None:
    """The run directory of this name that began last, of those that have a checkpoint."""
    root = experiment.runs.expanduser().resolve()
    numbered = {1: root / experiment.name}
    for folder in root.glob(f"{experiment.name}-*"):
        number = folder.name.removeprefix(f"{experiment.name}-")
        if number.isdecimal():
            numbered[int(number)] = folder
    return next((folder for _, folder in sorted(numbered.items(), reverse=True) if newest_checkpoint(folder)), None)


def describe(experiment: Experiment, folder: Path) -> None:
    """Write the experiment, the code revision and the library versions into a run directory: of its last start."""
    described = {"experiment": experiment.model_dump(mode="json"), "code": revision(), "libraries": versions()}
    (folder / "experiment.json").write_text(json.dumps(described, indent=2), encoding="utf-8")


def refuse_changes(experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Raises ValueError where a run cannot go on with an experiment: what is over cannot change, and adapters stay what they
    are."""
    described = load_experiment(checkpoint.run)
    if (written := described.learner.lora.adapters) != experiment.learner.lora.adapters:
        raise ValueError(f"the checkpoints of run {checkpoint.run} are of a learner with lora {written}; resume it with the same")
    over = described.stages[: checkpoint.position.stage]
    for index, (before, now) in enumerate(zip(over, experiment.stages, strict=False)):
        if before != now:
            raise ValueError(f"stages.{index} of run {checkpoint.run} is over and cannot change any more; start a new run")


def load_experiment(folder: Path) -> Experiment:
    """The experiment of a run directory."""
    path = folder / "experiment.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run directory: it has no experiment.json")
    return Experiment.model_validate(json.loads(path.read_text(encoding="utf-8"))["experiment"])


def learned_from_chats(model: str) -> bool:
    """Whether a model is that of a run, as far as is known, and the run's data are laid out by a chat template."""
    try:
        data = load_experiment(Path(model).expanduser()).data
    except ValueError:  # a folder of Hugging Face's, a name on the Hub, a run of another version
        return False
    return not isinstance(data, Documents) and data.chat is not None
