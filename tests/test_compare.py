"""The comparison on the stories pair: its arithmetic on hand-made runs, and that nothing finished is run again."""

import math
from collections.abc import Sequence
from pathlib import Path

import compare
import pytest
import torch
from comparison.findings import CLAIMS, Claim, Verdict, verdict
from comparison.gaps import head_and_tail
from comparison.plan import HEADS, LAST_WRITTEN, METHODS, START, VARIANTS, Entry, experiment, plan
from comparison.report import filled_in
from comparison.results import Outcome, Spread, curve_of, noise
from comparison.tables import measures_table, relative, time_table
from rich.console import Console

from raykd.experiment import Experiment

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


def test_the_noise_is_the_pooled_deviation_between_seeds():
    groups = [Spread([1.0, 3.0]), Spread([0.0, 0.0, 6.0]), Spread([7.0])]
    assert noise(groups) == pytest.approx(math.sqrt((2.0 + 24.0) / 3))
    with pytest.raises(ValueError, match="two seeds"):
        noise([Spread([1.0])])


@pytest.mark.parametrize(
    ("better", "worse", "higher", "expected"),
    [
        ([1.0, 1.0], [2.1, 2.1], False, Verdict.YES),
        ([1.0, 1.0], [1.9, 1.9], False, Verdict.NOISE),
        ([2.1, 2.1], [1.0, 1.0], False, Verdict.NO),
        ([2.1, 2.1], [1.0, 1.0], True, Verdict.YES),
        ([1.0], [2.1], False, Verdict.NOISE),  # fewer seeds, a wider margin
        ([], [1.0], False, Verdict.OPEN),
    ],
)
def test_a_difference_counts_from_twice_its_standard_error_on(
    better: list[float], worse: list[float], higher: bool, expected: Verdict
):
    assert verdict(Claim("", "", "", "", higher), Spread(better), Spread(worse), noise=0.5) is expected


def test_tables_hold_means_and_spreads_over_seeds():
    groups = {
        "kd": [outcome("kd", 0, 2.0, [2.0, 1.8]), outcome("kd", 1, 3.0, [2.0, 1.6])],
        "gkd": [outcome("gkd", 0, 6.0, [2.0, 1.0]), outcome("gkd", 1, 6.0, [2.0, 1.2])],
    }
    assert relative(groups["gkd"][1], groups["kd"]) == 2.0
    head, *rows = measures_table(groups)
    column = head.index("reverse KL")
    assert {row[0]: row[column] for row in rows} == {"kd": "1.700 ± 0.141", "gkd": "1.100 ± 0.141", "noise": "0.141"}
    head, *rows = time_table(groups, "fifth")
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert by_name["gkd"]["relative to KD"] == "2.50 ± 0.71"
    assert by_name["kd"]["reverse KL 1.55 after seconds"] == "-"
    assert by_name["gkd"]["reverse KL 1.55 after seconds"] == "3 ± 0"
    assert by_name["gkd"]["reverse KL after 2 s"] == "1.625 ± 0.059"


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
