"""Each measure against a case worked by hand, or against the published scorer."""

import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from raykd.evaluation.answers import bleu, same_number
from raykd.evaluation.calibration import accuracy, expected_calibration_error
from raykd.evaluation.diversity import distinct_n, self_bleu
from raykd.evaluation.exposure_bias import excess_error
from raykd.evaluation.rouge import by_length, rouge_l


def test_rouge_l_of_the_dolly_outputs_is_that_of_the_published_scorer(data: Path):
    rows = [json.loads(line) for line in (data / "data/dolly/test.jsonl").read_text().splitlines()]
    # Another row's answer, and the first half of the right one: from almost nothing in common to a great deal.
    outputs = [row["output"] for row in rows]
    texts = [
        other if index % 2 else own[: len(own) // 2]
        for index, (own, other) in enumerate(zip(outputs, outputs[::-1], strict=True))
    ]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    published = [100 * scorer.score(target, text)["rougeL"].fmeasure for target, text in zip(outputs, texts, strict=True)]
    ours = [rouge_l(text, [target]) for target, text in zip(outputs, texts, strict=True)]
    assert ours == pytest.approx(published, abs=1e-6)
    assert fmean(ours) == pytest.approx(fmean(published), abs=1e-6) and 20 < fmean(ours) < 60


def test_rouge_l_by_hand():
    # LCS "the cat" of 3 and 4 words: precision 2/3, recall 2/4, F 4/7. Stemming makes "cats" a "cat".
    assert rouge_l("the cats slept", ["the black cat ran"]) == pytest.approx(100 * 4 / 7)
    assert rouge_l("the cats slept", ["nothing here", "the black cat ran"]) == pytest.approx(100 * 4 / 7), "the best reference"
    assert rouge_l("", ["the black cat ran"]) == 0


def test_values_are_grouped_by_the_length_of_the_reference():
    assert by_length([1, 2, 3, 4, 5, 6], [0, 5, 6, 10, 11, 300]) == {"0-5": 1.5, "6-10": 3.5, "11+": 5.5}
    assert by_length([7], [8]) == {"6-10": 7}


def test_excess_error_by_hand():
    own = [torch.tensor([1.0, 3.0, 2.0]), torch.tensor([2.0])]  # means 1.5, 3, 2; R = 1.5, 4.5, 6.5
    teacher = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])]  # means 1, 1.5; l eps = 1, 2.5
    assert excess_error(own, teacher).tolist() == pytest.approx([50.0, 80.0])


def test_a_finished_sequence_leaves_the_average_of_excess_error():
    """Counted as zeros, the short sequences would pull both sums, and the curve, to where they stood when they ended."""
    long = [torch.full((8,), 2.0)]
    short = [torch.tensor([2.0])] * 9
    teacher = [torch.ones(8)]
    torch.testing.assert_close(excess_error(long + short, teacher), torch.full((8,), 100.0, dtype=torch.float64))


def test_a_student_like_its_teacher_has_no_excess_error():
    own, teacher = [torch.tensor([0.0, 0.0, 1.0])], [torch.tensor([0.0, 0.0, 0.0])]
    assert excess_error(own, teacher).tolist() == [0, 0, math.inf]


def test_own_prefixes_as_good_as_the_teachers_have_no_excess_error():
    kls = [torch.rand(5), torch.rand(3)]
    assert excess_error(kls, kls).tolist() == pytest.approx([0.0] * 5)


def test_expected_calibration_error_by_hand():
    # Range (0.9, 1]: confidence 0.95 twice, one right: |0.5 - 0.95| * 2/4. Range (0.5, 0.6]: 0.6 twice, both right: 0.4 * 2/4.
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 1, 0])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.45 / 2 + 0.4 / 2, abs=1e-6)
    assert accuracy(probabilities, labels) == 0.75


def test_calibration_at_its_ends():
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert expected_calibration_error(certain, torch.tensor([0, 1])) == 0
    assert expected_calibration_error(certain, torch.tensor([1, 0])) == 1
    # Half of the answers at confidence 1/2 are right.
    assert expected_calibration_error(torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])) == 0


def test_distinct_n_by_hand():
    # 4-grams: 1234, 2341, 3412 | 1234, and none in the short ones: 3 different of 4.
    assert distinct_n([[1, 2, 3, 4, 1, 2], [], [1, 2, 3, 4], [9, 9]]) == pytest.approx(100 * 3 / 4)
    assert distinct_n([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(100 * 4 / 5)
    assert distinct_n([[1, 1, 1]], n=1) == pytest.approx(100 / 3)
    assert distinct_n([[1]]) == 0


def test_self_bleu_by_hand():
    assert self_bleu([["a b c d e", "a b c d e"], ["x y", "x y"]]) == pytest.approx(100)
    # "a b" and "a c": 1-gram precision 1/2, no 2-gram in common: smoothed to 1/2 of one in one, so sqrt(1/2 * 1/2).
    assert self_bleu([["a b", "a c"]]) == pytest.approx(50)
    with pytest.raises(ValueError, match="at least two"):
        self_bleu([["alone"]])


def test_bleu_by_hand_and_with_unequal_numbers_of_references():
    # 1- to 4-gram precisions 4/5, 3/4, 2/3, 1/2 of "a b c d x" against "a b c d e"; no brevity penalty.
    assert bleu(["a b c d x"], [["a b c d e"]]) == pytest.approx(100 * math.prod([4 / 5, 3 / 4, 2 / 3, 1 / 2]) ** 0.25)
    assert bleu(["a b c d e", "f g h i j"], [["no", "a b c d e"], ["f g h i j"]]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", "18", True),
        ("The answer is 18.0 dollars.", "18", True),
        (r"so \boxed{\frac{36}{2}}", "18", True),
        ("He has 1,250 of 70,000 left.\n#### 70,000", "70000", True),
        ("First 18, then 5 more, so 23.", "18", False),
        ("I do not know.", "18", False),
        ("", "18", False),
    ],
)
def test_the_last_number_of_a_solution_is_its_answer(text: str, answer: str, right: bool):
    assert same_number(text, answer) is right


def test_every_reference_solution_of_gsm8k_is_right(data: Path):
    rows = [json.loads(line) for line in (data / "data/gsm8k/test.jsonl").read_text().splitlines()[:100]]
    assert all(same_number(row["output"], row["answer"]) for row in rows)
    assert sum(same_number(row["output"], other["answer"]) for row, other in pairwise(rows)) < 10
