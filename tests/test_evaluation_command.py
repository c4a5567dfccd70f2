"""`raykd evaluate`, from the command line to the files it writes."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from raykd import commands
from raykd.algorithms import SFT
from raykd.chat import Chat
from raykd.evaluation.diversity import distinct_n
from raykd.evaluation.evaluate import Answers, Evaluation, answer
from raykd.evaluation.generate import Decoding, in_own_process, write
from raykd.evaluation.question_sets import ask_all
from raykd.evaluation.results import Measured, ModelResults, Results, SuiteResults
from raykd.evaluation.rouge import rouge_l
from raykd.evaluation.suites import ALPACA, Suite
from raykd.experiment import EngineConfig, Experiment, Model, Stage
from raykd.records import Prompt
from raykd.rollout.config import EngineSettings
from raykd.run_directory import describe, learned_from_chats
from raykd.sources import Conversations, Pairs

ENGINE = ("--engine.dtype", "float32", "--engine.cpu-cache-gib", "0.1")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["raykd", "evaluate", *arguments])
    commands.main()


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a user reads; the command must exit with 2."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_wrong_input_is_one_sentence_naming_value_and_remedy(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    stories = str(data / "models/stories260K")
    cases = {
        (stories, "--suite", "dollly"): "error: suite dollly is not known; choose from dolly, self_inst, vicuna",
        (stories, "--suite", ""): "error: suites: Tuple should have at least 1 item",
        ("--suite", "vicuna"): "error: models: Tuple should have at least 1 item",
        ("./no/such", "--suite", "vicuna"): "error: model ./no/such: no such folder; give a Hugging Face model folder, a run",
        (stories, "--suite", "./no.jsonl"): "error: data file ./no.jsonl does not exist",
        (stories, "--suite", "vicuna", "--max-tokens", "512"): "error: suite vicuna: answers of 512 tokens fill the context",
        (stories, "--suite", "vicuna", "--judge-url", "http://127.0.0.1:1/v1"): "judge.url http://127.0.0.1:1/v1 cannot be",
        (stories, "--suite", "vicuna", "--limit", "0"): "limit",
        (stories, "--suite", "vicuna", "--metric", "meteor"): "exact_match",
        (stories, "--suite", "vicuna", "--judge-model", "gpt-4"): "error: judge_model gpt-4 needs judge_url, the endpoint that",
        (stories, "--prompt", "{q}", "--metric", "bleu"): "error: prompt, metric would change suites that are files or Hub data",
        (stories, "--suite", "vicuna", "--output", "gpt2-0.1B"): "error: output gpt2-0.1B does not end in .json; name a file",
    }
    for arguments, expected in cases.items():
        assert expected in complaint(capsys, monkeypatch, *arguments), arguments


@pytest.mark.parametrize("taken", ["e.json", "e.answers.jsonl"])
def test_results_that_could_not_be_written_are_refused_before_a_model_starts(
    data: Path, tmp_path: Path, taken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / taken).mkdir()
    stories, output = str(data / "models/stories260K"), str(tmp_path / "e.json")
    said = complaint(capsys, monkeypatch, stories, "--suite", "vicuna", "--output", output)
    assert said == f"error: output {output}: {tmp_path / taken} cannot be written (Is a directory); name another file"
    assert [file.name for file in tmp_path.iterdir()] == [taken], "trying leaves nothing behind"


def test_alpacas_prompt_without_input_belongs_to_alpacas_prompt():
    assert commands.Rows().suite().data == ALPACA
    assert commands.Rows(prompt="{instruction}\n{context}\n").suite().data.prompt_without_input is None
    assert commands.Rows(prompt_without_input="{instruction}").suite().data.prompt_without_input == "{instruction}"


def test_the_harness_is_asked_for_by_name_where_it_is_missing(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raykd.evaluation.harness.find_spec", lambda name: None)
    stories = str(data / "models/stories260K")
    said = complaint(capsys, monkeypatch, stories, "--suite", "vicuna", "--harness-tasks", "arc_easy")
    assert said == "error: harness_tasks needs lm-evaluation-harness, which is not installed: pip install 'raykd[harness]'"


def test_mean_and_spread_are_over_seeds():
    assert Measured(values=(1.0, 3.0)).mean == 2 and Measured(values=(1.0, 3.0)).spread == pytest.approx(2**0.5)
    assert str(Measured(values=(24.6,))) == "24.60" and str(Measured(values=(1.0, 3.0))) == "2.000 ± 1.414"
    assert str(Measured(values=(math.inf, 1.0))) == "inf" and str(Measured(values=(math.nan, 1.0))) == "nan"


def test_results_go_through_json_and_into_tables(tmp_path: Path):
    teacher = ModelResults(measures={"rouge_l": Measured(values=(27.0, 29.0))})
    student = ModelResults(measures={"test_loss": Measured(values=(3.5, math.inf))}, excess_error=(0.0, 5.0, math.inf))
    suite = SuiteResults(rows=2, left_out=1, models={"teacher": teacher, "student": student})
    results = Results(protocol={}, suites={"dolly": suite}, harness={"student": {"arc": {"acc,none": 0.25}}})
    results.save(tmp_path / "new" / "e.json")
    saved = (tmp_path / "new" / "e.json").read_text()
    assert Results.model_validate_json(saved) == results
    assert json.loads(saved)["suites"]["dolly"]["models"]["teacher"]["measures"]["rouge_l"]["mean"] == 28
    dolly, arc = results.tables()
    assert [list(column.cells) for column in dolly.columns] == [["rouge_l", "test_loss"], ["28.00 ± 1.41", ""], ["", "inf"]]
    assert "1 left out" in str(dolly.title) and "arc" in str(arc.title) and list(arc.columns[1].cells) == ["0.250"]


def test_paths_in_brackets_are_told_as_they_are(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    student, output = untrained(data, tmp_path / "run[v2]"), tmp_path / "found[v2].json"
    describe(sft(student, Conversations(path="x")), Path(student))
    run(monkeypatch, student, "--suite", "sst2", "--limit", "2", *ENGINE, "--output", str(output))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{student} learned from chats and is asked in plain text; --chat asks in" in printed
    assert f"{student} is measured" in printed and f"results: {output}" in printed


def sft(student: str, data: Pairs | Conversations) -> Experiment:
    stages = (Stage(algorithm=SFT(), steps=1),)
    return Experiment(name="x", student=Model(path=student), teacher=None, data=data, stages=stages)


def test_a_run_that_learned_from_chats_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert not learned_from_chats("owner/name") and not learned_from_chats(".")
    for data in (Pairs(path="x"), Pairs(path="x", chat=Chat()), Conversations(path="x", field="turns")):
        describe(sft("m", data), tmp_path)
        assert learned_from_chats(".") == (data.chat is not None)
    (tmp_path / "experiment.json").write_text('{"experiment": {"name": "of another version"}}')
    assert not learned_from_chats(".")


def test_names_in_brackets_stand_in_tables_as_they_are():
    models = {"./exp[v2]/m": ModelResults(measures={"rouge_l": Measured(values=(27.0,))}), "[/x]": ModelResults(measures={})}
    results = Results(protocol={}, suites={"./mine[1].jsonl": SuiteResults(rows=2, left_out=1, models=models)})
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(*results.tables())
    printed = console.export_text()
    assert all(name in printed for name in ("./exp[v2]/m", "[/x]", "./mine[1].jsonl"))


def test_answers_outlive_an_evaluation_that_is_interrupted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raykd.evaluation.evaluate.answer", lambda *_: Answers({}, {"vicuna": [["a", "b"]]}))
    monkeypatch.setattr("raykd.evaluation.evaluate.measure", interrupt)
    (tmp_path / "e.answers.jsonl").write_text("of an earlier evaluation")
    arguments = str(data / "models/stories260K"), "--suite", "vicuna", "--limit", "2", "--max-tokens", "24", "--seeds", "1"
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "--output", str(tmp_path / "e.json"))
    assert stopped.value.code == 130
    partial = tmp_path / "e.answers.jsonl.partial"
    assert [json.loads(line)["text"] for line in partial.read_text().splitlines()] == ["a", "b"]
    assert f"stopped; what was answered until then: {partial}" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "e.answers.jsonl").read_text() == "of an earlier evaluation"


@pytest.mark.stack
def test_a_student_and_its_teacher_are_measured_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    teacher, student, output = str(data / "models/stories260K"), untrained(data, tmp_path / "run"), tmp_path / "found.json"
    rows = ({"instruction": text, "input": "", "output": text} for text in ("Once upon a time", "a cat"))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suites = f"vicuna,sst2,{tmp_path / 'own.jsonl'}"
    options = ("--suite", suites, "--limit", "4", "--max-tokens", "24", "--seeds", "10", "20", *ENGINE, "--output", str(output))
    run(monkeypatch, student, "--teacher", teacher, *options)
    results = Results.model_validate_json(output.read_text())
    assert [suite.rows for suite in results.suites.values()] == [4, 4, 2]
    answers = [json.loads(line) for line in (tmp_path / "found.answers.jsonl").read_text().splitlines()]
    assert all(answer["prompt"].strip() for answer in answers)
    assert len(answers) == (4 + 2) * 2 * 2 and len({answer["text"] for answer in answers}) == len(answers)
    for name, suite in ((name, suite) for name, suite in results.suites.items() if name != "sst2"):
        assert list(suite.models) == [teacher, student]
        assert suite.models[student].excess_error and not suite.models[teacher].excess_error
        of_teacher, of_student = (found.measures for found in suite.models.values())
        for seed, value in zip((10, 20), of_student["rouge_l"].values, strict=True):
            chosen = [a for a in answers if (a["suite"], a["model"], a["seed"]) == (name, student, seed)]
            assert value == pytest.approx(sum(rouge_l(a["text"], a["references"]) for a in chosen) / len(chosen))
        assert of_student["test_loss"].mean > 0 and of_student["reverse_kl"].mean > 1 and of_student["forward_kl"].mean > 1
        assert set(of_student) - set(of_teacher) == {"rouge_l_to_teacher", "forward_kl", "reverse_kl", "excess_error"}
        of_answers = {name for name, measured in of_student.items() if len(measured.values) == 2}
        assert {"rouge_l", "rouge_l_to_teacher", "reverse_kl", "excess_error"} <= of_answers
    assert [set(found.measures) for found in results.suites["sst2"].models.values()] == [{"accuracy", "ece"}] * 2
    printed = capsys.readouterr().out
    assert "vicuna: 4 rows, 0 left out" in printed and "rouge_l" in printed and f"results: {output}" in printed


def untrained(data: Path, run: Path) -> str:
    """A run directory with a random student of the stories' vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(run / "student")
    AutoTokenizer.from_pretrained(data / "models/stories260K").save_pretrained(run / "student")
    return str(run)


@pytest.mark.stack
def test_no_run_of_tokens_comes_twice_where_that_is_asked_and_seeds_repeat_their_answers(data: Path):
    stories, prompts = str(data / "models/stories260K"), [(1, 403, 407, 261, 378), (1, 320)]
    asked = [(Prompt(id=str(row), tokens=tokens), 40 + 20 * row) for row, tokens in enumerate(prompts)]
    engine = EngineSettings(dtype="float32", max_length=100, vocab_size=512, cpu_cache_gib=0.1)
    blocked = Decoding(seeds=(10, 20, 10), no_repeat_ngram_size=2)
    one, other, again = in_own_process(write, stories, engine, blocked, (2,), asked)
    assert [r.tokens for r in one] == [r.tokens for r in again] != [r.tokens for r in other]
    for rollout, (prompt, limit) in zip([*one, *other], asked * 2, strict=True):
        assert distinct_n([rollout.prompt_tokens + rollout.tokens], n=2) == 100
        assert rollout.prompt_tokens == prompt.tokens and len(rollout.tokens) <= limit
        assert rollout.finished is (rollout.tokens[-1] == 2)


@pytest.mark.stack
@pytest.mark.parametrize("ngram", [0, 6], ids=["vllm", "transformers"])
def test_an_answer_ends_at_any_eos_that_the_model_lists(data: Path, tmp_path: Path, ngram: int):
    run, ends = untrained(data, tmp_path / "run"), {2, *range(400, 440)}
    GenerationConfig(eos_token_id=sorted(ends)).save_pretrained(tmp_path / "run" / "student")
    (tmp_path / "own.jsonl").write_text(json.dumps({"instruction": "a cat", "input": "", "output": "a"}) + "\n")
    suite = Suite(name="own", data=ALPACA.model_copy(update={"path": str(tmp_path / "own.jsonl")}), max_tokens=12)
    evaluation = Evaluation(
        models=(run,),
        suites=(suite,),
        decoding=Decoding(seeds=tuple(range(24)), no_repeat_ngram_size=ngram),
        engine=EngineConfig(dtype="float32", cpu_cache_gib=0.1),
    )
    question_sets, _ = ask_all([run], [suite], None)
    rollouts = [rollout for (rollout,) in answer(evaluation, question_sets[run]).rollouts["own"]]
    assert len({rollout.tokens[-1] for rollout in rollouts if rollout.finished}) > 2
    for rollout in rollouts:
        assert not ends & {*rollout.tokens[:-1]} and rollout.finished == (rollout.tokens[-1] in ends)
        assert rollout.finished or len(rollout.tokens) == 12
