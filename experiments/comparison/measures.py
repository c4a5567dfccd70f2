"""What a finished student of the stories pair is measured by: the papers' measures, on held-out stories."""

from functools import cache
from pathlib import Path

from stories import TEACHER, stories
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raykd.algorithms import SFT
from raykd.evaluation.generate import Decoding, write_with_transformers
from raykd.evaluation.likelihood import Texts, reference_rollout, score
from raykd.evaluation.measures import on_answers
from raykd.evaluation.results import Measured, ModelResults, Results, SuiteResults
from raykd.evaluation.suites import Question, Suite
from raykd.experiment import Experiment, TeacherConfig
from raykd.prompts import Pairs, eos_id
from raykd.records import Rollout
from raykd.report.folders import EVALUATION
from raykd.rollout.config import EngineSettings
from raykd.run import prepare

DECODING = Decoding(seeds=(10, 20, 30, 40))
SUITE = Suite(name="stories", data=Pairs(path="", prompt="", response=""))
"""Rouge-L, length and diversity; the questions come from the experiment, already tokenised."""


def measure_student(run: Path) -> None:
    """Measure the student of a run, into its evaluation.json: complete or absent."""
    partial = run / f"{EVALUATION}.partial"
    measure(run / "student").save(partial)
    partial.rename(run / EVALUATION)


def measure(student: Path) -> Results:
    """Four answers to each of the held-out prompts that no run trains on, and the teacher's to the same ones."""
    asked, tokenizer = questions(), the_tokenizer()
    own, teachers = answers(str(student)), answers(TEACHER)
    texts = Texts(
        references=[reference_rollout(question.prompt) for question in asked],
        own=own,
        teachers=teachers,
    )
    found = score(str(student), TEACHER, TeacherConfig(dtype="float32"), len(tokenizer), {SUITE.name: texts}, {})[SUITE.name]
    measures = on_answers(SUITE, asked, own, decoded(own), decoded(teachers))
    measures |= {name: Measured(values=values) for name, values in found.measures.items()}
    models = {"student": ModelResults(measures=measures, excess_error=found.excess_error)}
    protocol = {"decoding": DECODING.model_dump(mode="json"), "teacher": TEACHER}
    return Results(protocol=protocol, suites={SUITE.name: SuiteResults(rows=len(asked), left_out=0, models=models)})


@cache
def questions() -> list[Question]:
    """The stories that every run holds out."""
    experiment, tokenizer = setting(), the_tokenizer()
    held_out = prepare(experiment, tokenizer).held_out
    return [Question(row, prompt, (str(tokenizer.decode(list(prompt.response))),)) for row, prompt in enumerate(held_out)]


@cache
def the_tokenizer() -> PreTrainedTokenizerBase:
    """Student and teacher share it."""
    return AutoTokenizer.from_pretrained(TEACHER)


def setting() -> Experiment:
    """Data and lengths, the same for every run."""
    return stories(SFT()).model_copy(update={"text": None})


def answers(model: str) -> list[list[Rollout]]:
    """For each seed the model's answer to every question."""
    experiment, tokenizer = setting(), the_tokenizer()
    engine = EngineSettings(dtype="float32", max_length=experiment.max_length, vocab_size=len(tokenizer))
    asked = [(question.prompt, experiment.max_response) for question in questions()]
    return write_with_transformers(model, engine, DECODING, eos_id(tokenizer), asked)


def decoded(seeds: list[list[Rollout]]) -> list[list[str]]:
    """The texts of the answers."""
    tokenizer = the_tokenizer()
    return [tokenizer.batch_decode([list(rollout.tokens) for rollout in seed], skip_special_tokens=True) for seed in seeds]
