"""The comparison: its arithmetic on hand-made runs, and that nothing finished is run again."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import compare
import pytest
import torch
from comparison.findings import CLAIMS, Claim, Verdict, verdict
from comparison.gaps import head_and_tail
from comparison.in_process import Writer, run_in_process
from comparison.measures import measure, questions
from comparison.pairs import PAIRS, START, TEACHER, TEACHER_TEXT, TEXT
from comparison.plan import HEADS, LAST_WRITTEN, METHODS, VARIANTS, Entry, experiment, plan
from comparison.report import filled_in
from comparison.results import Outcome, Spread, curve_of, noise, read_outcome
from comparison.tables import claims_table, cost_table, measures_table, relative, time_table
from rich.console import Console
from safetensors.torch import load_file
from stories import stories
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.actors import ModelFacts
from raykd.evaluation.generate import in_own_process
from raykd.experiment import EvaluationConfig, Experiment
from raykd.rollout.requests import GenerationRequest

Line = dict[str, float]


def step(number: int, seconds: float) -> Line:
    return {"step": number, "seconds/wait": seconds / 2, "seconds/learn": seconds / 2, "seconds/score": 9.0, "tokens/learn": 100}


def held_out(number: int, reverse_kl: float) -> Line:
    return {"step": number, "heldout/loss": 2.0, "heldout/forward_kl": 1.0, "heldout/reverse_kl": reverse_kl}


def outcome(variant: str, seed: int, seconds: float, reverse_kls: Sequence[float], **measures: float) -> Outcome:
    """One step of ``seconds`` before every held-out measurement but the first."""
    lines = [held_out(0, reverse_kls[0])]
    for number, value in enumerate(reverse_kls[1:], start=1):
        lines += [step(number, seconds), held_out(number, value)]
    every = dict.fromkeys(("test_loss", "forward_kl", "rouge_l", "rouge_l_to_teacher", "distinct_4", "self_bleu"), 1.0)
    every |= {"excess_error": 0.0, "reverse_kl": reverse_kls[-1]} | measures
    return Outcome(Entry("fifth", variant, seed), curve_of(lines), every, [0.0, 1.0], [1.0, 2.0])


def test_a_curve_counts_training_alone_and_a_step_done_twice_once():
    lines = [held_out(0, 3.0), step(1, 2.0), step(2, 50.0), step(2, 4.0), held_out(2, 1.0)]
    start, end = curve_of(lines)
    assert (start.seconds, start.tokens, start.values["reverse_kl"]) == (0, 0, 3.0)
    assert (end.step, end.seconds, end.tokens, end.values["reverse_kl"]) == (2, 6.0, 200, 1.0)


def test_equal_time_and_a_level_lie_on_the_line_between_two_measurements():
    run = outcome("kd", 0, 4.0, [2.0, 1.0, 1.5, 0.5])
    assert run.at_seconds(2.0, "reverse_kl") == 1.5
    assert run.at_seconds(6.0, "reverse_kl") == 1.25
    assert run.at_seconds(12.0, "reverse_kl") == 0.5
    assert run.at_seconds(20.0, "reverse_kl") is None
    assert run.reaches("reverse_kl", 1.25) == (3.0, 75.0)
    assert run.reaches("reverse_kl", 2.5) == (0.0, 0.0)
    assert run.reaches("reverse_kl", 0.1) is None


def seeds(*values: float) -> Spread:
    return Spread(dict(enumerate(values)))


def test_the_noise_is_the_pooled_deviation_between_seeds():
    groups = [seeds(1.0, 3.0), seeds(0.0, 0.0, 6.0), seeds(7.0)]
    assert noise(groups) == pytest.approx(math.sqrt((2.0 + 24.0) / 3))
    with pytest.raises(ValueError, match="two seeds"):
        noise([seeds(1.0)])


def test_variants_are_compared_on_the_seeds_that_both_have():
    assert Spread({0: 1.0, 2: 5.0}).minus(Spread({0: 3.0, 1: 9.0})) == Spread({0: -2.0})


@pytest.mark.parametrize(
    ("difference", "higher", "expected"),
    [
        ([-1.1, -1.1], False, Verdict.YES),
        ([-0.9, -0.9], False, Verdict.NOISE),
        ([1.1, 1.1], False, Verdict.NO),
        ([1.1, 1.1], True, Verdict.YES),
        ([-1.1], False, Verdict.NOISE),  # fewer seeds, a wider margin
        ([], False, Verdict.OPEN),
    ],
)
def test_a_difference_counts_from_twice_its_standard_error_on(difference: list[float], higher: bool, expected: Verdict):
    assert verdict(Claim("", "", "", "", higher), seeds(*difference), noise=0.5) is expected


def test_tables_hold_means_and_spreads_over_seeds():
    groups = {
        START: [outcome(START, 0, 1.0, [9.0, 2.0]), outcome(START, 1, 1.0, [9.0, 2.0])],
        "kd": [outcome("kd", 0, 2.0, [2.0, 1.8]), outcome("kd", 1, 3.0, [2.0, 1.6])],
        "gkd": [outcome("gkd", 0, 6.0, [2.0, 1.0]), outcome("gkd", 1, 6.0, [2.0, 1.2])],
    }
    assert relative(groups["gkd"][1], groups["kd"]) == 2.0
    head, *rows = measures_table(groups)
    column = head.index("reverse KL")
    assert {row[0]: row[column] for row in rows} == {
        "(fine-tuned student)": "2.000 ± 0.000",
        "kd": "1.700 ± 0.141",
        "gkd": "1.100 ± 0.141",
        "noise": "0.141",
    }
    claim = Claim("GKD", "gkd", "kd", "reverse_kl")
    (_, row) = claims_table(groups, [claim, *CLAIMS["dolly"][:1]])[:2]
    assert row == ["GKD", "reverse KL: `gkd` below `kd`", "1.100", "1.700", "2", "-0.600", "0.283", "reproduced"]
    costs, times = (
        {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
        for table in (cost_table(groups, "fifth"), time_table(groups))
    )
    assert costs["gkd"]["relative to KD"] == "2.50 ± 0.71"
    assert costs["kd"]["reverse KL 1.6 after seconds"] == "3 (1 of 2)"
    assert costs["gkd"]["reverse KL 1.6 after seconds"] == "3 ± 0"
    assert times["gkd"]["reverse KL after 2 s"] == "1.625 ± 0.059"
    assert times["kd"]["reverse KL after 6 s"] == "-"


def test_a_table_takes_the_place_between_its_markers():
    page = "before\n<!-- a -->\nold\n<!-- end -->\nafter\n<!-- b -->\n<!-- end -->\n"
    assert filled_in(page, {"a": [["x", "y"], ["1", "2"]]}) == (
        "before\n<!-- a -->\n| x | y |\n|---|---|\n| 1 | 2 |\n<!-- end -->\nafter\n<!-- b -->\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match="<!-- c -->"):
        filled_in(page, {"c": [["x"]]})


def test_the_head_is_the_smallest_set_of_half_the_teachers_mass():
    teacher = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    student = torch.tensor([0.1, 0.1, 0.5, 0.3], dtype=torch.float64).log()
    head, tail = head_and_tail(student, teacher)
    assert head == pytest.approx(0.3 + 0.2)
    assert tail == pytest.approx(0.0 + 0.1)


def test_every_run_of_the_plan_is_there_once_and_is_an_experiment(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAYKD_RUNS", str(tmp_path))
    entries = plan()
    assert len(set(entries)) == len(entries)
    assert {entry.variant for entry in entries} == {*VARIANTS, HEADS, TEACHER, TEACHER_TEXT, TEXT}
    for pair, claims in CLAIMS.items():
        ran = {entry.variant for entry in entries if entry.pair == pair}
        assert {claim.better for claim in claims} | {claim.worse for claim in claims} <= ran
    for entry in entries:
        if entry.variant != HEADS and not entry.trained:
            assert Experiment.model_validate_json(experiment(entry).model_dump_json()) == experiment(entry)


def test_a_run_waits_for_what_it_begins_with_and_for_its_teacher(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAYKD_RUNS", str(tmp_path))
    kd, start, text = (Entry("dolly", variant, 1) for variant in ("kd", START, TEXT))
    teacher, teacher_text = (Entry("dolly", variant, 0) for variant in (TEACHER, TEACHER_TEXT))
    assert (kd.needs, start.needs, teacher.needs) == ([start, teacher], [text, teacher], [teacher_text])
    assert text.ready and teacher_text.ready and not (teacher.ready or start.ready)
    for entry in (text, teacher_text, teacher):
        finish(entry, tmp_path)
    assert start.ready and not kd.ready
    learns = experiment(start)
    assert learns.teacher is not None and learns.teacher.path == str(teacher.student)
    assert learns.student.path == str(text.student) and learns.student.scratch is None
    assert Entry("half", TEACHER, 0).trained and Entry("half", START, 1).ready, "the stories' teacher is there already"


def finish(entry: Entry, runs: Path) -> None:
    """What is left of a trained run."""
    file = runs / "compare" / entry.name / "student" / LAST_WRITTEN
    file.parent.mkdir(parents=True)
    file.touch()


def test_a_finished_run_is_not_repeated(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAYKD_RUNS", str(tmp_path))
    start, kd = Entry("fifth", START, 0), Entry("fifth", "kd", 0)
    for entry in (start, kd):
        finish(entry, tmp_path)
    assert kd.trained and not kd.finished
    monkeypatch.setattr(compare, "plan", lambda: [start, kd])
    compare.train_missing(Console())
    assert sorted(path.name for path in (tmp_path / "compare").iterdir()) == [kd.name, start.name]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Two small random Llamas."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5
        )
        LlamaForCausalLM(config).save_pretrained(folder / str(seed))
    student, teacher = str(folder / "1"), str(folder / "2")
    return ModelFacts(student=student, teacher=teacher, vocab_size=7, eos_ids=(0,), max_length=16, seed=0)


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(prompt_id="p", sample=n, prompt_tokens=(3, 1, 4), salt=0) for n in range(count)]


@torch.no_grad()
def dense(folder: str | None, ids: Sequence[int]) -> torch.Tensor:
    """log-probs of the token after every position; [T, V]."""
    assert folder is not None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_token_follows_the_mixture_of_teacher_and_student(facts: ModelFacts, share: float):
    rollouts = Writer(facts).generate(requests(4000), share, max_tokens=2)
    prompt = list(requests(1)[0].prompt_tokens)
    law = (1 - share) * dense(facts.student, prompt)[-1].exp() + share * dense(facts.teacher, prompt)[-1].exp()
    drawn = torch.bincount(torch.tensor([rollout.tokens[0] for rollout in rollouts]), minlength=7) / len(rollouts)
    assert (drawn - law).abs().sum() / 2 < 0.03  # about twice what chance gives
    assert (dense(facts.student, prompt)[-1].exp() - dense(facts.teacher, prompt)[-1].exp()).abs().sum() / 2 > 0.2


def test_written_responses_end_at_eos_and_carry_the_students_log_probs(facts: ModelFacts):
    rollouts = Writer(facts).generate(requests(200), 0.5, max_tokens=8)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    assert all((rollout.tokens[-1] == 0) == rollout.finished and 0 not in rollout.tokens[:-1] for rollout in rollouts)
    rollout = max(rollouts, key=lambda rollout: len(rollout.tokens))
    expected = dense(facts.student, [*rollout.prompt_tokens, *rollout.tokens])[len(rollout.prompt_tokens) - 1 : -1]
    assert rollout.student_logprobs == pytest.approx(expected.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0], abs=1e-5)


def test_prompts_of_several_lengths_are_answered_as_each_alone(facts: ModelFacts):
    lengths = [GenerationRequest(prompt_id=str(n), sample=0, prompt_tokens=(3, 1, 4, 1, 5, 2)[:n], salt=0) for n in (2, 6, 4)]
    rollouts = Writer(facts).generate(lengths, 0.4, max_tokens=5)
    for request, rollout in zip(lengths, rollouts, strict=True):
        prompt = request.prompt_tokens
        assert rollout.prompt_tokens == prompt
        expected = dense(facts.student, [*prompt, *rollout.tokens])[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        assert rollout.student_logprobs == pytest.approx(chosen, abs=1e-5)


def test_a_student_is_measured_under_every_seed_and_the_teacher_against_nobody(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    teacher = PAIRS["fifth"].teacher
    assert teacher is not None
    few = questions("fifth", teacher)[:8]
    monkeypatch.setattr("comparison.measures.questions", lambda pair, teacher: few)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    found = measure("fifth", str(tmp_path / "student"), teacher).suites["stories"].models["student"]
    assert {len(found.measures[name].values) for name in ("rouge_l", "reverse_kl", "excess_error", "distinct_4")} == {4}
    assert len(found.excess_error) == 64 and found.measures["reverse_kl"].mean > 1
    itself = measure("fifth", teacher, teacher)
    itself.save(tmp_path / "evaluation.json")
    read = read_outcome(Entry("fifth", TEACHER, 0), tmp_path)
    assert read.measures["test_loss"] < found.measures["test_loss"].mean
    assert not {"forward_kl", "rouge_l_to_teacher"} & set(read.measures) and not read.curve


def train_quietly(*runs: Experiment) -> None:
    for run in runs:
        run_in_process(run, Console(quiet=True))


@pytest.mark.stack
def test_a_run_in_one_process_learns_and_goes_on_where_it_was_interrupted(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("RAYKD_RUNS", str(tmp_path))
    finish(Entry("fifth", START, 0), tmp_path)
    untrained = stories(METHODS["sft"])
    short = experiment(Entry("fifth", "minillm", 0)).model_copy(
        update={"student": untrained.student, "evaluation": EvaluationConfig(prompts=8), "checkpoint_every": 4}
    )
    few = [short.model_copy(update={"stages": (short.stages[0].model_copy(update={"steps": steps}),)}) for steps in (4, 8)]
    whole = few[1].model_copy(update={"name": "whole"})
    in_own_process(train_quietly, few[0], whole)
    interrupted = tmp_path / "compare" / short.name
    position = interrupted / "checkpoints" / "step-000004" / "driver.json"
    state = json.loads(position.read_text())
    state["position"] |= {"stage": 0, "step": 4}  # as it was written within the longer run
    position.write_text(json.dumps(state))
    in_own_process(train_quietly, few[1])
    weights = [load_file(tmp_path / "compare" / name / "student" / "model.safetensors") for name in (short.name, "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.stack
def test_a_student_reads_plain_text_and_then_follows_instructions(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAYKD_RUNS", str(tmp_path))
    in_own_process(train_a_little, (TEXT, TEACHER_TEXT, TEACHER, START, "gkd"))
    measured = {variant: held_out_of(tmp_path / "compare" / f"{variant}-dolly-0") for variant in (TEXT, TEACHER, START, "gkd")}
    for before, after in measured.values():
        assert after["heldout/loss"] < before["heldout/loss"]
    assert {"heldout/forward_kl", "heldout/reverse_kl"} <= set(measured[START][1]) - set(measured[TEACHER][1])
    assert measured["gkd"][0]["heldout/loss"] == pytest.approx(measured[START][1]["heldout/loss"], rel=1e-4)


def train_a_little(variants: Sequence[str]) -> None:
    """One after the other, each on what those before it have left."""
    for variant in variants:
        run = experiment(Entry("dolly", variant, 0))
        evaluation = run.evaluation.model_copy(update={"prompts": 4, "every": 0})
        few = run.stages[0].model_copy(update={"steps": 4, "batch_size": 4})
        short = run.model_copy(update={"stages": (few,), "evaluation": evaluation})
        run_in_process(short, Console(quiet=True), reads=variant in (TEXT, TEACHER_TEXT))


def held_out_of(run: Path) -> list[Line]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "heldout/loss" in line]
