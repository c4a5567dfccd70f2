"""The command ``raykd``: what is done with models once they are there. A training run is a file of its own, see experiments/."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field
from rich.console import Console
from transformers.utils.logging import set_verbosity_error
from tyro.extras import SubcommandApp

from raykd.chat import Chat
from raykd.cli import exit_codes
from raykd.evaluation.generate import Decoding
from raykd.evaluation.suites import ALPACA, BUILT_IN, LabelSuite, Metric, Suite, find_suites
from raykd.experiment import EngineConfig
from raykd.sources import Pairs
from raykd.tracking import say
from raykd.value import Value

Flat = tyro.conf.arg(name="")
"""Its fields are options without a prefix."""


class Rows(Value):
    """The rows of suites that are files or Hub data sets."""

    prompt: str = ALPACA.prompt
    """Files and Hub data sets: template over a row's fields."""
    prompt_without_input: str | None = None
    """Files and Hub data sets: template for rows in which a field is empty that the other names and this one does not; by default
    Alpaca's where the prompt is, too."""
    response: str = "{output}"
    """Files and Hub data sets: template of the reference answer."""
    references: str | None = None
    """Files and Hub data sets: field with a list of accepted answers, where there are several."""
    metric: Metric = Metric.ROUGE
    """Files and Hub data sets: what is measured beside Rouge-L."""

    def suite(self) -> Suite:
        """The suite that these options describe."""
        without_input = self.prompt_without_input
        if without_input is None and self.prompt == ALPACA.prompt:
            without_input = ALPACA.prompt_without_input
        data = Pairs(path="", prompt=self.prompt, prompt_without_input=without_input, response=self.response)
        return Suite(name="", data=data, references=self.references, metric=self.metric)


class Evaluate(Value):
    """Measure models side by side by MiniLLM's protocol: T = 1, five seeds, Rouge-L; with a teacher also KL and exposure bias."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Hugging Face folders, run directories, or names on the Hub."""
    suite: str = "dolly,self_inst,vicuna"
    """Names (dialogsum, gsm8k, multi30k, sst2, boolq, too; found through RAYKD_DATA), files, Hub data sets owner/name@split."""
    teacher: str | None = None
    """Answers, too, and the others are compared with it."""
    decoding: Annotated[Decoding, Flat] = Decoding()
    rows: Annotated[Rows, Flat] = Rows()
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows of every suite."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    chat: bool = False
    """Every prompt is a user's message in the model's chat template."""
    system: str | None = None
    """With chat: the system message before it."""
    max_prompt: int | None = Field(default=None, ge=1)
    """Longest prompt; longer ones are left out, by default where the answer would not fit the context."""
    engine: EngineConfig = EngineConfig(deadline_s=86400.0)
    judge_url: str | None = None
    """OpenAI-compatible endpoint whose model rates the first seed's answers, e.g. http://localhost:8000/v1."""
    judge_model: str = ""
    """Name of the judging model there."""
    harness_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to run as well."""
    output: Path = Path("evaluation.json")
    """Results, a .json; every answer goes to a .answers.jsonl beside it."""

    def run(self, console: Console) -> None:
        from raykd.evaluation.evaluate import Evaluation, evaluate
        from raykd.evaluation.judge import Judge
        from raykd.run_directory import learned_from_chats

        suites = find_suites(self.suite, self.rows.suite())
        self._check_options(suites)
        set_verbosity_error()  # a prompt too long for the model is left out, and counted
        evaluation = Evaluation(
            models=self.models,
            teacher=self.teacher,
            suites=tuple(map(self._asked, suites)),
            decoding=self.decoding,
            max_prompt=self.max_prompt,
            engine=self.engine,
            judge=Judge(url=self.judge_url, model=self.judge_model) if self.judge_url else None,
            harness_tasks=self.harness_tasks,
        )
        self._check_output()
        for model in self.models:
            if not self.chat and learned_from_chats(model):
                say(
                    console,
                    f"{model} learned from chats and is asked in plain text; --chat asks in the template of its tokenizer",
                )
        with self._kept_answers(console) as keep:
            results = evaluate(evaluation, console, keep)
        results.save(self.output)
        for table in results.tables():
            console.print(table)
        say(console, f"results: {self.output}")

    @contextmanager
    def _kept_answers(self, console: Console) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
        """Writes answers as they come, since they take long. They replace those of an earlier evaluation once all is measured."""
        partial = self._answers.with_suffix(".jsonl.partial")
        partial.unlink(missing_ok=True)

        def keep(rows: list[dict[str, Any]]) -> None:
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

        try:
            yield keep
        except BaseException:
            if partial.exists():
                say(console, f"stopped; what was answered until then: {partial}")
            raise
        partial.replace(self._answers)

    @property
    def _answers(self) -> Path:
        return self.output.with_suffix(".answers.jsonl")

    def _check_options(self, suites: Sequence[Suite | LabelSuite]) -> None:
        """Raise ValueError for an option that nothing would read."""
        if self.judge_model and not self.judge_url:
            raise ValueError(f"judge_model {self.judge_model} needs judge_url, the endpoint that serves it")
        if self.system is not None and not self.chat:
            raise ValueError(f"system {self.system!r} is a message of a chat; add --chat, or leave it out")
        given = [name for name, value in self.rows if value != getattr(Rows(), name)]
        if given and {suite.name for suite in suites} <= {suite.name for suite in BUILT_IN}:
            raise ValueError(
                f"{', '.join(given)} would change suites that are files or Hub data sets, and suite {self.suite} names none; "
                "add one, or leave the option out"
            )

    def _check_output(self) -> None:
        """Raise ValueError unless both files can be written, for an evaluation takes long."""
        if self.output.suffix != ".json":
            raise ValueError(f"output {self.output} does not end in .json; name a file, e.g. {self.output}.json")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            for file in (self.output, self._answers):
                is_new = not file.exists()
                file.open("a").close()
                if is_new:
                    file.unlink()
        except OSError as error:
            raise ValueError(
                f"output {self.output}: {error.filename} cannot be written ({error.strerror}); name another file"
            ) from error

    def _asked(self, suite: Suite | LabelSuite) -> Suite | LabelSuite:
        chat = Chat(system=self.system) if self.chat else None
        changes = {"data": suite.data.model_copy(update={"limit": self.limit, "chat": chat})}
        if isinstance(suite, Suite):
            changes |= {"max_tokens": self.max_tokens}
        return suite.model_copy(update=changes)


class Report(Value):
    """One HTML page about training runs and evaluations, side by side; it needs no network and runs no script."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, finished or not; also results of raykd evaluate, or folders with an evaluation.json."""
    output: Path | None = None
    """Where the page goes: by default report.html in the run directory, or in the folder that several share."""

    def run(self, console: Console) -> None:
        from raykd.report import write_report

        say(console, f"report: {write_report(self.runs, self.output)}")


class Dashboard(Value):
    """The report's curves as a workspace of a Weights & Biases project: the same names, sections and order."""

    entity: str
    """Owner of the project: a user or a team."""
    project: str = "raykd"

    def run(self, console: Console) -> None:
        from raykd.report.dashboard import dashboard

        if not os.environ.get("WANDB_API_KEY"):
            raise ValueError("WANDB_API_KEY is not set: a dashboard is kept by Weights & Biases; raykd report needs no account")
        say(console, f"dashboard: {dashboard(self.entity, self.project).save().url}")


class LanguageModel(Value):
    """Write the language model of a checkpoint that takes images or sound, too, as one for text alone: what raykd distils."""

    model: tyro.conf.Positional[str]
    """Hugging Face folder, or a name on the Hub."""
    output: tyro.conf.Positional[Path]
    """Folder to write it to, with its tokenizer."""

    def run(self, console: Console) -> None:
        from raykd.language_model import save_language_model

        save_language_model(self.model, self.output)
        say(console, f"language model: {self.output}")


app = SubcommandApp()
app.command(name="evaluate")(Evaluate)
app.command(name="report")(Report)
app.command(name="dashboard")(Dashboard)
app.command(name="language-model")(LanguageModel)


def main() -> None:
    """Exits with 2 and one sentence where the input is wrong, with 130 where it was interrupted."""
    console = Console()
    with exit_codes(console):
        app.cli(prog="raykd", description=__doc__, config=(tyro.conf.EnumChoicesFromValues,)).run(console)
