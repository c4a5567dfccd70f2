"""`raykd report`: what the page says, what it never does, and how it looks to a browser."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Tab, tab
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from raykd import commands
from raykd.algorithms import SFT, DistiLLM, MiniLLM
from raykd.evaluation.results import Measured, ModelResults, Results, SuiteResults
from raykd.experiment import EvaluationConfig, Experiment, Model, Stage
from raykd.experiment.stage import Kept
from raykd.report import write_report
from raykd.report.charts import averaged
from raykd.report.dashboard import dashboard
from raykd.report.figures import number
from raykd.report.folders import read_run
from raykd.report.tables import differences, duration
from raykd.run_directory import new_folder
from raykd.sources import Pairs
from raykd.tracking import Tracker


def start(runs: Path, *, seed: int = 0, name: str = "dates", held_out: int = 8, keep: Kept = "last") -> Path:
    """A run directory as `run` makes it: nothing has been logged."""
    experiment = Experiment(
        name=name,
        teacher=Model(path="./teacher"),
        student=Model(path="./student"),
        data=Pairs(path="dates.jsonl"),
        stages=(Stage(algorithm=SFT(), steps=4, keep=keep), Stage(algorithm=MiniLLM(rollouts=128, text_coefficient=0), steps=6)),
        evaluation=EvaluationConfig(prompts=held_out, every=1),
        seed=seed,
        runs=runs,
    )
    return new_folder(experiment)


def tracker(folder: Path) -> Tracker:
    return Tracker(folder, {}, name=folder.name, wandb=False, project="", console=Console(quiet=True))


def log_steps(tracker: Tracker, first: int, last: int, **more: float) -> None:
    for step in range(first, last + 1):
        metrics = {"loss": 5.0 / step, "grad_norm": 1.0 + step % 2, "skipped": 0.0, "response_length": 12.0 + step % 3}
        sampled = {
            "importance_weight": 1.0,
            "importance_weight_squared": 1.25,
            "effective_sample_share": 0.8,
            "clip_fraction": 0.01 * step,
            "sft/nll": 4.0 / step,
        }
        used = {"seconds/generate": 0.5, "tokens/generate": 100, "seconds/learn": 0.25, "tokens/learn": 100, "seconds/wait": 0.4}
        tracker.log(step, metrics | (sampled if step > 4 else {}) | used | more)


def finish(folder: Path) -> Path:
    """Everything that a finished run of ``start`` holds."""
    with tracker(folder) as numbers:
        for step, reverse_kl in ((0, 13.0), (4, 2.0), (10, 0.64)):
            if step:
                log_steps(numbers, *((1, 4) if step == 4 else (5, 10)))
            numbers.log_held_out(step, {"loss": 6.0 / (step + 1), "forward_kl": 5.0, "reverse_kl": reverse_kl})
    (folder / "student").mkdir()
    return folder


def add_samples(folder: Path) -> None:
    lines = [
        {"step": step, "prompt": prompt, "student": f"<i>answer {step}</i>", "teacher": "the third", "reference": "3rd"}
        for step in range(10)
        for prompt in ("1905-11-03", "2001-01-01")
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def add_evaluation(folder: Path) -> None:
    models = {
        "teacher": ModelResults(measures={"rouge_l": Measured(values=(27.0, 29.0))}),
        "student": ModelResults(measures={"rouge_l": Measured(values=(24.0,))}, excess_error=(0.0, 5.0, 9.5)),
    }
    suites = {"dolly": SuiteResults(rows=2, left_out=1, models=models)}
    Results(protocol={}, suites=suites, harness={"student": {"arc_easy": {"acc,none": 0.25}}}).save(folder / "evaluation.json")
    answer = {"suite": "dolly", "row": 0, "model": "student", "seed": 10, "text": "an apple & a pear", "references": ["fruit"]}
    (folder / "evaluation.answers.jsonl").write_text(json.dumps(answer) + "\n")


class Page(HTMLParser):
    """The visible text of a page, and every address in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.source = page.read_text(encoding="utf-8")
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = re.findall(r"(?:url\(|@import)\s*[\"']?([^)\"';]*)", self.source)
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name.split(":")[-1] in ("src", "srcset", "href", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finish(start(tmp_path / "runs"))


def test_a_page_tells_what_the_run_was_how_it_went_and_what_to_look_for(run: Path):
    page = Page(write_report([run]))
    for words in (
        "SFT, 4 steps; then MiniLLM, 6 steps",
        "finished",
        "13.0 → 0.640",
        "Reverse KL on own answers",
        "nats per token",
        "Lower is better; 0 is the teacher itself.",
        "Training loss: SFT",
        "Training loss: MiniLLM",
        "Negative log-likelihood, on plain text (sft)",
        "dates ends at 0.400",  # of sft/nll at step 10
        "Effective share of the sample: 0.800",
        "Skipped steps: 0",
        "Forward KL on references, nats per token 5.00",
        "the learner waited 62% of the time, mostly for the rollout",
        "stages.1.algorithm.rollouts",
    ):
        assert words in page.text, words
    assert "Other numbers" not in page.text and "What is not the same" not in page.text


def test_seconds_and_tokens_per_second_add_up(run: Path):
    text = Page(write_report([run])).text
    assert re.search(r"generate writing responses 5.00 \S+ 200 ", text) and re.search(
        r"learn optimiser steps 2.50 \S+ 400 ", text
    )
    assert "generate 5.00 s" in text and "Tokens per second: dates" in text


def test_a_page_asks_for_nothing_outside_itself(run: Path):
    add_samples(run)
    add_evaluation(run)
    page = Page(write_report([run]))
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert set(re.findall(r"https?://[^\"'\s<]+", page.source)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_runs_stand_side_by_side_with_what_differs_between_them(tmp_path: Path):
    one, other = finish(start(tmp_path / "a")), finish(start(tmp_path / "b", seed=7))
    path = write_report([one, other, one])
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert "a/dates" in page.text and "b/dates" in page.text and "dates-2" not in page.text
    differing = page.text.split("What is not the same in all runs:")[1].split("Every setting")[0]
    assert differing.split() == ["a/dates", "b/dates", "seed", "0", "7", "runs", str(tmp_path / "a"), str(tmp_path / "b")]
    assert page.source.count('stroke="var(--series-1)"') >= 10 and "over time" in page.text


def test_runs_are_called_by_as_many_folders_as_tell_them_apart(tmp_path: Path):
    same = [finish(start(tmp_path / place / "seed0")) for place in ("first", "second")]
    text = Page(write_report([*same, start(tmp_path, name="other")])).text
    assert "first/seed0/dates, second/seed0/dates, other" in text
    assert "first/seed0/dates ends at 0.640 second/seed0/dates ends at 0.640" in text


@pytest.mark.parametrize(
    ("keep", "measured", "expected"),
    [
        ("last", {0: 0.5, 1: 5.0, 2: 1.0, 3: 3.0, 4: 4.0}, "Cross-entropy on references, nats per token 0.500 → 4.00"),
        ("loss", {0: 0.5, 1: 5.0, 2: 1.0, 3: 3.0, 4: 4.0}, "of step 2, the best of their stage .* 0.500 → 1.00"),
        ("rouge_l", {0: 0.5, 1: 5.0, 2: math.nan, 3: 3.0, 4: 4.0}, "of step 1, the best of their stage .* 0.500 → 5.00"),
        ("loss", {0: 0.5, 2: 1.0, 4: 4.0, 7: 2.0}, "Cross-entropy on references, nats per token 0.500 → 2.00"),
        ("loss", {0: 0.5}, "Cross-entropy on references, nats per token 0.500 "),
    ],
)
def test_what_came_of_a_run_is_what_its_stage_kept(tmp_path: Path, keep: Kept, measured: dict[int, float], expected: str):
    folder = start(tmp_path, keep=keep)
    with tracker(folder) as numbers:
        if 2 in measured:  # a run that died, and does the step again
            numbers.log_held_out(2, {"loss": 0.1, "rouge_l": 9.0})
        for step, value in measured.items():
            numbers.log_held_out(step, {"loss": value, "rouge_l": value})
    text = Page(write_report([folder])).text
    assert re.search(expected, text) and ("weights kept" in text) == ("best of" in expected)


def test_a_stage_that_only_one_run_has_is_one_difference(tmp_path: Path):
    runs = [read_run(start(tmp_path)), read_run(start(tmp_path))]
    described = {field: text for field, text in runs[1].settings.items() if not field.startswith("stages.1.")}
    shorter = replace(runs[1], spans=runs[1].spans[:1], settings=described | {"stages.0.steps": "9"})
    assert differences([runs[0], shorter]).rows == {
        "stages": ["SFT, 4 steps; then MiniLLM, 6 steps", "SFT, 4 steps"],
        "stages.0.steps": ["4", "9"],
    }


def test_samples_show_first_and_last_answers_beside_teacher_and_reference(run: Path):
    add_samples(run)
    page = Page(write_report([run]))
    assert page.text.count("<i>answer 0</i>") == page.text.count("<i>answer 9</i>") == 2 and "i" not in page.tags
    moments = re.findall(r"step (\d+) <i>", page.text)
    assert moments == ["0", "2", "4", "5", "7", "9"] * 2 and page.text.count("the third") == page.text.count("3rd") == 2


def test_evaluations_of_a_run_a_folder_or_a_file_become_tables(run: Path, tmp_path: Path):
    add_evaluation(run)
    in_run = Page(write_report([run])).text
    alone = Page(write_report([run / "evaluation.json"], tmp_path / "new" / "alone.html")).text
    model = tmp_path / "model"
    model.mkdir()
    add_evaluation(model)
    for text in (in_run, alone, Page(write_report([model])).text):
        assert "dolly: 2 questions, 1 left out as too long" in text and "28.00 ± 1.41 24.00" in text
        assert "lm-evaluation-harness: arc_easy" in text and "acc,none 0.250" in text
        assert "Exposure bias: dolly" in text and "student ends at 9.50" in text
        assert "an apple & a pear" in text and "fruit" in text
    assert "Settings" in in_run and "Settings" not in alone


def test_answers_that_cannot_be_read_are_counted_and_no_others_left_out(tmp_path: Path):
    add_evaluation(tmp_path)
    file = tmp_path / "evaluation.answers.jsonl"
    answer = json.loads(file.read_text()) | {"text": "one\u2028two\x85three"}
    file.write_text(json.dumps(answer, ensure_ascii=False) + '\n{"suite": "dol', encoding="utf-8")
    text = Page(write_report([tmp_path])).text
    assert "one two three" in text and "1 unreadable line of evaluation.answers.jsonl left out." in text


@pytest.mark.parametrize(
    ("show", "value", "expected"),
    [
        (duration, 59.7, "1 min 0 s"),
        (duration, 119.6, "2 min 0 s"),
        (duration, 3599.9, "1 h 0 min"),
        (duration, 3901, "1 h 5 min"),
        (duration, 12.3, "12 s"),
        (number, 999.4, "999"),
        (number, 999.6, "1,000"),
        (number, 0.5, "0.500"),
    ],
)
def test_numbers_are_rounded_before_they_are_parted(show: Callable[[float], str], value: float, expected: str):
    assert show(value) == expected


def test_a_run_that_is_going_on_is_shown_as_far_as_it_is(tmp_path: Path):
    folder = start(tmp_path)
    assert "No step has been logged yet" in Page(write_report([folder])).text
    with tracker(folder) as numbers:
        log_steps(numbers, 1, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    text = Page(write_report([folder])).text
    assert "Not finished: at step 3 of 10" in text and "No held-out numbers yet." in text
    assert "1 unreadable line of metrics.jsonl left out" in text and "Training loss: SFT" in text


def test_a_run_without_held_out_prompts_says_why_there_are_no_held_out_numbers(tmp_path: Path):
    folder = start(tmp_path, held_out=0)
    with tracker(folder) as numbers:
        log_steps(numbers, 1, 10)
    assert "No held-out numbers: evaluation.prompts is 0" in Page(write_report([folder])).text


def test_numbers_that_are_not_finite_are_named_and_left_out(tmp_path: Path):
    folder = start(tmp_path)
    with tracker(folder) as numbers:
        log_steps(numbers, 1, 4)
        log_steps(numbers, 5, 6, grad_norm=math.inf, reward=math.nan)
    page = Page(write_report([folder]))
    assert "grad_norm is not finite at 2 steps, first at 5" in page.text and "reward is not finite" in page.text
    assert not re.search(r"\bNaN|Infinity|\bnan\b", page.source)


def test_of_a_step_that_a_resumed_run_did_again_the_later_line_counts_and_the_time_of_both(tmp_path: Path):
    folder = start(tmp_path)
    lines = [(1, 3.0, 9.0), (2, 5.0, 8.0), (3, 6.0, 7.0), (2, 1.5, 5.0), (3, 2.0, 4.0)]  # resumed after step 1
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "seconds": seconds, "loss": loss}) + "\n" for step, seconds, loss in lines)
    )
    steps = read_run(folder).steps
    assert [(line["step"], line["loss"]) for line in steps] == [(1, 9), (2, 5), (3, 4)]
    assert [line["elapsed_seconds"] for line in steps] == [3, 7.5, 8]


def test_a_metric_without_description_is_shown_under_its_own_name(tmp_path: Path):
    folder = start(tmp_path)
    with tracker(folder) as numbers:
        for step in (1, 2):
            log_steps(numbers, step, step, surprise=step)
    text = Page(write_report([folder])).text
    assert "Other numbers" in text and "surprise" in text and "dates ends at 2.00" in text


def test_what_is_no_run_is_one_sentence(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty").mkdir()
    damaged = start(tmp_path)
    (damaged / "experiment.json").write_text('{"experiment": {"stages"')
    cases = {
        tmp_path / "nowhere": "no such folder or file; give a run directory",
        tmp_path / "empty": "is no run directory: it has no experiment.json",
        damaged: "is damaged and does not describe a run",
        run / "metrics.jsonl": "is no result of raykd evaluate",
    }
    for path, expected in cases.items():
        monkeypatch.setattr("sys.argv", ["raykd", "report", str(run), str(path)])
        with pytest.raises(SystemExit) as stopped:
            commands.main()
        said = " ".join(capsys.readouterr().out.split())
        assert stopped.value.code == 2 and said.startswith("error: ") and str(path) in said and expected in said, said


def test_the_command_says_where_the_page_is(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["raykd", "report", str(run)])
    commands.main()
    assert capsys.readouterr().out.strip() == f"report: {run / 'report.html'}"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500), st.integers(1, 100))
def test_spans_cover_every_point_once_and_hold_its_value(values: list[float], num_spans: int):
    spans = averaged(list(enumerate(values)), num_spans)
    assert len(spans) <= num_spans and spans[0]["first"] == 0 and spans[-1]["last"] == len(values) - 1
    assert all(before["last"] + 1 == after["first"] for before, after in pairwise(spans))
    total = sum(span["y"] * (span["last"] - span["first"] + 1) for span in spans)
    assert total == pytest.approx(sum(values), rel=1e-9, abs=1e-3)
    for span in spans:
        inside = values[int(span["first"]) : int(span["last"]) + 1]
        assert (span["low"], span["high"]) == (min(inside), max(inside))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_a_complaint_a_request_or_a_sideways_scroll(browser: Tab, run: Path, width: int):
    add_samples(run)
    add_evaluation(run)
    page = write_report([run, finish(start(run.parent / "others", seed=1, name="a-rather-long-name-of-another-run"))])
    browser.open(page, width)
    assert browser.said == [] and browser.requests == [page.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width
    sizes = browser.value("[...document.querySelectorAll('figure svg.marks')].map(e => e.getBoundingClientRect().width)")
    assert len(sizes) == page.read_text().count("<figure>") > 10 and all(300 < size <= min(width, 400) for size in sizes)
    strokes = browser.value(
        "[...new Set([...document.querySelectorAll('.mark-line path')].map(e => getComputedStyle(e).stroke))]"
    )
    assert set(strokes) >= {"rgb(0, 114, 178)", "rgb(196, 78, 0)"}  # the charts find the page's colours


def test_the_browser_would_notice(browser: Tab, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('a complaint')</script><img src='http://127.0.0.1:9/x.png'>")
    browser.open(page, 1280)
    assert "a complaint" in " ".join(browser.said) and "http://127.0.0.1:9/x.png" in browser.requests


def test_the_dashboard_shows_the_reports_numbers_under_their_names() -> None:
    sections = dashboard("someone", "raykd").sections
    shown = [metric for section in sections for panel in section.panels for metric in getattr(panel, "y", [])]
    assert {"heldout/reverse_kl", "loss", "entropy", "importance_weight", "grad_norm", "seconds/generate"} <= set(shown)
    assert len(shown) == len(set(shown))
    words = torch.randn(3, 5).log_softmax(-1)
    for term in (MiniLLM().text, MiniLLM(text_distillation=0.5).text, DistiLLM.code().text):
        assert term is not None
        said = term.algorithm.per_token(words, words, torch.tensor([1, 2, 3]), {})
        assert {f"{type(term.algorithm).__name__.lower()}/{name}" for name in said if name != "loss"} <= set(shown)
    assert [section.name for section in sections if section.is_open] == ["Held-out quality", "Loss"]
