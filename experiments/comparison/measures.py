"""What a finished student is measured by: the papers' measures, on questions that no run trains on."""

from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from comparison.pairs import PAIRS
from raykd.evaluation.generate import write_with_transformers
from raykd.evaluation.likelihood import Texts, score
from raykd.evaluation.measures import on_answers
from raykd.evaluation.results import Measured, ModelResults, Results, SuiteResults
from raykd.evaluation.suites import Question
from raykd.experiment import TeacherConfig
from raykd.pretrained import eos_ids
from raykd.records import Rollout
from raykd.report.folders import EVALUATION
from raykd.rollout.config import EngineSettings


def measure_student(pair: str, student: str, teacher: str, run: Path) -> None:
    """Measure a student into the evaluation.json of its run: complete or absent."""
    run.mkdir(parents=True, exist_ok=True)
    partial = run / f"{EVALUATION}.partial"
    measure(pair, student, teacher).save(partial)
    partial.rename(run / EVALUATION)


def measure(pair: str, student: str, teacher: str) -> Results:
    """The student's answers under every seed beside the teacher's to the same questions; of the teacher itself its own alone."""
    suite, asked, tokenizer = PAIRS[pair].suite, questions(pair, teacher), tokenizer_of(teacher)
    guide = teacher if student != teacher else None
    own, teachers = answers(pair, student, teacher), answers(pair, guide, teacher) if guide else []
    texts = Texts(references=[Rollout.reference(question.prompt) for question in asked], own=own, teachers=teachers)
    found = score(student, guide, TeacherConfig(dtype="float32"), len(tokenizer), {suite.name: texts}, {})[suite.name]
    measures = on_answers(suite, asked, own, decoded(own, tokenizer), decoded(teachers, tokenizer) if guide else None)
    measures |= {name: Measured(values=values) for name, values in found.measures.items()}
    models = {"student": ModelResults(measures=measures, excess_error=found.excess_error)}
    protocol = {"decoding": PAIRS[pair].decoding.model_dump(mode="json"), "teacher": teacher}
    return Results(protocol=protocol, suites={suite.name: SuiteResults(rows=len(asked), left_out=0, models=models)})


@cache
def questions(pair: str, teacher: str) -> list[Question]:
    """Of a pair, in the tokens that its models share."""
    return PAIRS[pair].questions(PAIRS[pair], tokenizer_of(teacher))


@cache
def tokenizer_of(teacher: str) -> PreTrainedTokenizerBase:
    """Student and teacher share it."""
    return AutoTokenizer.from_pretrained(teacher)


@cache
def answers(pair: str, model: str, teacher: str) -> list[list[Rollout]]:
    """For each seed the model's answer to every question; those of the teacher serve for all its students."""
    setting, tokenizer = PAIRS[pair].setting(), tokenizer_of(teacher)
    engine = EngineSettings(dtype="float32", max_length=setting.max_length, vocab_size=len(tokenizer))
    asked = [(question.prompt, setting.max_response) for question in questions(pair, teacher)]
    return write_with_transformers(model, engine, PAIRS[pair].decoding, eos_ids(model, tokenizer), asked)


def decoded(seeds: list[list[Rollout]], tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The texts of the answers."""
    return [tokenizer.batch_decode([list(rollout.tokens) for rollout in seed], skip_special_tokens=True) for seed in seeds]
