"""The replay buffer: exact epochs, bounds that hold, a state that resumes."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from pydantic import ValidationError

from raykd.algorithms.base import Replay
from raykd.records import Rollout, Row, Source
from raykd.replay import ReplayBuffer


def row(name: int, version: int = 0, source: Source = Source.STUDENT) -> Row:
    logprobs = None if source is Source.DATASET else (-1.0,)
    return Row(
        rollout=Rollout(
            prompt_id=str(name),
            sample=0,
            prompt_tokens=(1,),
            tokens=(2,),
            source=source,
            student_logprobs=logprobs,
            version=version,
        ),
        scores=f"reference {name}",
    )


def buffer(**bounds: int) -> ReplayBuffer:
    replay = ReplayBuffer()
    replay.begin(Replay.model_validate(bounds))
    return replay


def names(rows: list[Row]) -> list[str]:
    return [row.rollout.prompt_id for row in rows]


def test_k_samples_per_insert_are_k_shuffled_epochs():
    replay = buffer(capacity=12, samples_per_insert=3)
    replay.add([row(i) for i in range(12)])
    epochs = [[name for _ in range(3) for name in names(replay.sample(4, version=0))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(i) for i in range(12)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert replay.held(0) == 0 and replay.sample(4, version=0) == []


def test_a_batch_never_holds_a_row_twice():
    replay = buffer(capacity=8, samples_per_insert=7)
    replay.add([row(i) for i in range(5)])
    counts: Counter[str] = Counter()
    while replay.held(0):
        batch = names(replay.sample(3, version=0))
        assert len(set(batch)) == len(batch)
        counts.update(batch)
    assert set(counts.values()) == {7}


def test_the_oldest_rows_leave_when_capacity_is_passed():
    replay = buffer(capacity=3)
    replay.add([row(i) for i in range(5)])
    assert replay.held(0) == 3
    assert sorted(names(replay.sample(5, version=0))) == ["2", "3", "4"]


def test_rows_older_than_max_staleness_are_not_given_out_but_data_never_grows_old():
    replay = buffer(max_staleness=2)
    replay.add([row(0, version=3), row(1, version=5), row(2, version=0, source=Source.DATASET)])
    assert sorted(names(replay.sample(10, version=6))) == ["1", "2"]


def test_a_restored_buffer_continues_where_the_saved_one_was():
    replay = buffer(samples_per_insert=2)
    replay.add([row(i) for i in range(10)])
    replay.sample(4, version=0)
    restored = ReplayBuffer(seed=99)
    restored.restore(replay.state())
    assert [names(restored.sample(3, 0)) for _ in range(4)] == [names(replay.sample(3, 0)) for _ in range(4)]


def test_the_state_holds_no_scores():
    replay = buffer()
    replay.add([row(0)])
    assert replay.state()["rows"][0].scores is None


def test_without_a_bound_on_uses_every_draw_is_uniform():
    replay = buffer(capacity=4)
    replay.add([row(i) for i in range(4)])
    counts = Counter(name for _ in range(4000) for name in names(replay.sample(1, version=0)))
    assert replay.held(0) == 4
    assert all(abs(count - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75) for count in counts.values())


def test_restored_rows_get_their_scores_back_in_place():
    replay = buffer()
    replay.add([row(i) for i in range(3)])
    restored = ReplayBuffer()
    restored.restore(replay.state())
    restored.rescore([replace(row, scores="again") for row in restored.rows()])
    assert [(row.rollout.prompt_id, row.scores) for row in restored.rows()] == [("0", "again"), ("1", "again"), ("2", "again")]


def test_a_new_stage_begins_with_nothing():
    replay = buffer()
    replay.add([row(0)])
    replay.begin(Replay())
    assert replay.rows() == []


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"samples_per_insert": 0}, {"max_staleness": -1}])
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Replay.model_validate(wrong)
