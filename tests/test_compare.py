"""The comparison on the stories pair: its arithmetic on hand-made runs, and that nothing finished is run again."""

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
from comparison.plan import HEADS, LAST_WRITTEN, METHODS, START, VARIANTS, Entry, experiment, plan
from comparison.report import filled_in
from comparison.results import Outcome, Spread, curve_of, noise
from comparison.tables import cost_table, measures_table, relative, time_table
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


def test_every_run_of_the_plan_is_there_once_and_is_an_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RAYKD_RUNS", str(tmp_path))
    entries = plan()
    assert len(set(entries)) == len(entries)
    assert {entry.variant for entry in entries} == {*VARIANTS, HEADS}
    assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} <= {*METHODS, *VARIANTS}
    finish(Entry("fifth", START, 0), tmp_path)
    for entry in entries:
        if entry.variant != HEADS:
            assert Experiment.model_validate_json(experiment(entry).model_dump_json()) == experiment(entry)


def finish(entry: Entry, runs: Path) -> None:
    """What is left of a trained run."""
    file = runs / "compare" / entry.name / LAST_WRITTEN
    file.parent.mkdir(parents=True)
    file.touch()


def test_a_finished_run_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
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


def train_quietly(run: Experiment) -> None:
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
    for each in (few[0], whole):
        in_own_process(train_quietly, each)
    interrupted = tmp_path / "compare" / short.name
    position = interrupted / "checkpoints" / "step-000004" / "driver.json"
    state = json.loads(position.read_text())
    state["position"] |= {"stage": 0, "step": 4}  # as it was written within the longer run
    position.write_text(json.dumps(state))
    in_own_process(train_quietly, few[1])
    weights = [load_file(tmp_path / "compare" / name / "student" / "model.safetensors") for name in (short.name, "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
