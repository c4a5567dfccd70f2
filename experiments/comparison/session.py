"""Many runs by the same workers, one after the other: engines take longer to start than a small student takes to learn."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from raykd.actors import ModelFacts
from raykd.experiment import Experiment
from raykd.phases import Position
from raykd.prompts import eos_id
from raykd.run import check_models, connect, new_folder, prepare
from raykd.tracking import Tracker
from raykd.train import measure, restore_checkpoint, train
from raykd.workers import Workers


class Session:
    """The workers of experiments that differ in their stages alone; ``with Session(experiments, checkpoint) as session:``.

    Every run begins with the student of ``checkpoint`` (a learner's folder, of the student that the experiments name), at the
    beginning of the prompts and at step 0, as a run of its own would.
    """

    def __init__(self, experiments: Sequence[Experiment], checkpoint: Path) -> None:
        every = experiments[0].model_copy(update={"stages": tuple(stage for e in experiments for stage in e.stages)})
        assert every.teacher is not None, "they are compared with their teacher"
        self._tokenizer = check_models(every)
        self._data = prepare(every, self._tokenizer)
        self._streams = self._data.prompts.state(), self._data.text.state() if self._data.text else {}
        self._checkpoint = checkpoint
        connect(every)
        facts = ModelFacts(
            student=every.student.path,
            teacher=every.teacher.path,
            vocab_size=len(self._tokenizer),
            eos_ids=(eos_id(self._tokenizer),),
            max_length=every.max_length,
            seed=every.seed,
        )
        self._workers = Workers(every, facts)

    def run(self, experiment: Experiment, folder: Path, console: Console) -> None:
        """Train in a run directory like any other, from its newest checkpoint where it has one."""
        self._data.prompts.restore(self._streams[0])
        if self._data.text is not None:
            self._data.text.restore(self._streams[1])
        resumes = any(folder.glob("checkpoints/step-*/driver.json"))
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)
            new_folder(experiment)
            self._workers.restore(self._checkpoint, version=0)
        at = restore_checkpoint(self._workers, self._data, folder) if resumes else Position()
        config = experiment.model_dump(mode="json")
        with Tracker(folder, config, name=folder.name, wandb=False, project="", console=console) as tracker:
            if not resumes:
                measure(experiment, self._workers, self._data, tracker, at)
            train(experiment, self._workers, self._data, tracker, folder, at)
            self._workers.save_student(folder / "student")
        self._tokenizer.save_pretrained(folder / "student")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._workers.close()
