"""Dealing rows to ranks and padding them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.algorithms import KD, SFT, MiniLLM
from raykd.collate import collate, deal, length, micro_batches
from raykd.head import Head
from raykd.packing import PADDING
from raykd.records import Rollout, Row, Scores, Source, Totals

LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=40)
HEAD = Head(weight=torch.zeros(11, 3))


def make_row(prompt: int, response: int, name: str = "a", **fields: object) -> Row:
    rollout = Rollout(
        prompt_id=name,
        sample=0,
        prompt_tokens=tuple(range(1, prompt + 1)),
        tokens=tuple(range(5, 5 + response)),
        source=Source.STUDENT,
        student_logprobs=(-1.0,) * response,
    )
    scores = Scores(
        offsets=(0, response),
        log_normaliser=torch.arange(response) / 2,
        logprobs=-torch.arange(1.0, response + 1),
        hidden=torch.arange(3.0 * response).view(response, 3),
    )
    return Row(rollout=replace(rollout, **fields), scores=scores, teacher_logprobs=tuple(scores.logprobs.tolist()))


def collated(rows: list[Row], algorithm: SFT | KD | MiniLLM, head: Head | None = HEAD):
    totals = Totals.of(rows)
    return collate(rows, algorithm, totals, fetch=lambda block: block, teacher_head=head, vocab_size=11)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_every_row_is_dealt_once_and_counts_differ_by_at_most_one(lengths: list[tuple[int, int]], ranks: int) -> None:
    rows = [make_row(prompt, response, name=str(index)) for index, (prompt, response) in enumerate(lengths)]
    dealt = deal(rows, ranks)
    assert sorted(row.rollout.prompt_id for share in dealt for row in share) == sorted(row.rollout.prompt_id for row in rows)
    counts = [len(share) for share in dealt]
    assert max(counts) - min(counts) <= 1
    assert deal(rows, ranks) == dealt


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_no_rank_has_more_than_one_longest_row_beyond_another_of_equal_count(lengths: list[tuple[int, int]], ranks: int) -> None:
    rows = [make_row(prompt, response) for prompt, response in lengths]
    rows = rows[: len(rows) - len(rows) % ranks]
    tokens = [sum(length(row) for row in share) for share in deal(rows, ranks)]
    assert max(tokens) - min(tokens) <= max((length(row) for row in rows), default=0)


def test_the_longest_row_goes_to_the_rank_with_the_fewest_tokens() -> None:
    rows = [make_row(0, response) for response in (9, 8, 7, 2)]
    assert [[length(row) for row in share] for share in deal(rows, 2)] == [[9, 2], [8, 7]]


def test_micro_batches_hold_every_row_longest_first() -> None:
    rows = [make_row(1, response) for response in (3, 9, 1, 5, 7)]
    assert [[len(row.rollout.tokens) for row in batch] for batch in micro_batches(rows, 2)] == [[9, 7], [5, 3], [1]]


def test_position_n_predicts_response_token_n() -> None:
    micro = collated([make_row(2, 3), make_row(3, 1)], KD())
    assert micro.layout.input_ids.tolist() == [[1, 2, 5, 6], [1, 2, 3, 0]]  # the last token predicts nothing and is left out
    assert micro.sequences.tolist() == [0, 0, 0, 1]
    assert micro.positions.tolist() == [1, 2, 3, 4 + 2]
    assert micro.slots.tolist() == [0, 1, 2, 0]
    assert micro.tokens.tolist() == [5, 6, 7, 5]
    assert micro.batch.tokens.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert isinstance(micro.teacher, torch.Tensor) and micro.needs_head
    assert micro.teacher.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]]
    assert micro.logprobs.tolist() == [-1, -2, -3, -1]


def test_a_text_without_a_prompt_is_predicted_from_its_second_token_on() -> None:
    row = make_row(0, 4)
    taught = collated([row, make_row(1, 1)], KD())
    assert taught.logprobs.tolist() == [-2, -3, -4, -1]
    assert taught.log_normaliser.tolist() == [0.5, 1.0, 1.5, 0.0]
    assert isinstance(taught.teacher, torch.Tensor)
    assert taught.teacher.tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11], [0, 1, 2]]
    micro = collated([row], SFT())
    assert micro.layout.input_ids.tolist() == [[5, 6, 7]]
    assert micro.positions.tolist() == [0, 1, 2]
    assert micro.tokens.tolist() == [6, 7, 8]
    assert micro.batch.mask.tolist() == [[False, True, True, True]]
    assert Totals.of([row]).tokens == int(micro.batch.mask.sum())


def test_no_rows_and_empty_responses_predict_nothing() -> None:
    for rows in ([], [make_row(3, 0)]):
        micro = collated(rows, MiniLLM())
        assert len(micro.tokens) == 0
        assert not micro.batch.mask.any()
        assert isinstance(micro.teacher, torch.Tensor)
        assert len(micro.teacher) == 0


def test_the_behaviour_is_the_law_the_token_was_drawn_from() -> None:
    mixed = make_row(1, 2, source=Source.MIXED, teacher_share=0.25)
    given_answer = make_row(1, 2, source=Source.DATASET, student_logprobs=None)
    cold = make_row(1, 2, temperature=0.5)
    batch = collated([mixed, make_row(1, 2), given_answer, cold], MiniLLM()).batch
    expected = (0.25 * torch.tensor([-1.0, -2.0]).exp() + 0.75 * torch.tensor([-1.0, -1.0]).exp()).log()
    assert torch.allclose(batch.behaviour_logprobs[0], expected)
    assert batch.behaviour_logprobs[1].tolist() == [-1, -1]
    assert batch.behaviour_logprobs[2].tolist() == batch.behaviour_logprobs[3].tolist() == [0, 0]
    assert batch.teacher_logprobs[2].tolist() == [-1, -2]
    assert batch.by_student.tolist() == [True, True, False, True]


def test_scores_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"x/0 has no teacher scores"):
        collated([replace(make_row(1, 2, name="x"), scores=None)], KD())
    with pytest.raises(ValueError, match=r"x/0 has 2 tokens but 3 scores"):
        collated([replace(make_row(1, 2, name="x"), scores=make_row(1, 3).scores)], KD())
    with pytest.raises(ValueError, match="no teacher head"):
        collated([make_row(1, 2)], KD(), head=None)
    with pytest.raises(ValueError, match=r"x/0 has 2 tokens but 1 scores"):
        collated([replace(make_row(1, 2, name="x"), teacher_logprobs=(-1.0,))], MiniLLM(single_step=False))


def test_padding_that_is_the_eos_hides_nothing() -> None:
    """Masks come from lengths: an EOS inside the prompt is read, the one that ends a response is learned, padding is neither."""
    eos = PADDING
    ended = make_row(3, 3, prompt_tokens=(1, eos, 2), tokens=(5, 6, eos), student_logprobs=(-1.0,) * 3)
    rows = [ended, make_row(1, 1, tokens=(eos,))]
    micro = collate(rows, KD(), Totals.of(rows), fetch=lambda block: block, teacher_head=HEAD, vocab_size=11)
    assert micro.layout.input_ids.tolist() == [[1, eos, 2, 5, 6], [1, eos, eos, eos, eos]]
    assert micro.tokens.tolist() == [5, 6, eos, eos]
    assert micro.positions.tolist() == [2, 3, 4, 5]
    assert micro.batch.mask.tolist() == [[True, True, True], [True, False, False]]
