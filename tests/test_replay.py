"""The replay buffer: exact epochs, bounds that hold, a state that resumes."""

from collections import Counter

import pytest

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


def names(rows: list[Row]) -> list[str]:
    return [row.rollout.prompt_id for row in rows]


def test_k_samples_per_insert_are_k_shuffled_epochs():
    replay = ReplayBuffer(capacity=12, max_staleness=0)
    replay.add([row(i) for i in range(12)], samples_per_insert=3)
    epochs = [[name for _ in range(3) for name in names(replay.sample(4, version=0))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(i) for i in range(12)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(replay) == 0 and replay.sample(4, version=0) == []


def test_a_batch_never_holds_a_row_twice():
    replay = ReplayBuffer(capacity=8, max_staleness=0)
    replay.add([row(i) for i in range(5)], samples_per_insert=7)
    counts: Counter[str] = Counter()
    while len(replay):
        batch = names(replay.sample(3, version=0))
        assert len(set(batch)) == len(batch)
        counts.update(batch)
    assert set(counts.values()) == {7}


def test_the_oldest_rows_leave_when_capacity_is_passed():
    replay = ReplayBuffer(capacity=3, max_staleness=0)
    assert replay.add([row(i) for i in range(5)]) == 3
    assert sorted(names(replay.sample(5, version=0))) == ["2", "3", "4"]


def test_rows_older_than_max_staleness_are_not_given_out_but_data_never_grows_old():
    replay = ReplayBuffer(capacity=10, max_staleness=2)
    replay.add([row(0, version=3), row(1, version=5), row(2, version=0, source=Source.DATASET)])
    assert sorted(names(replay.sample(10, version=6))) == ["1", "2"]


def test_a_restored_buffer_continues_where_the_saved_one_was():
    replay = ReplayBuffer(capacity=10, max_staleness=0)
    replay.add([row(i) for i in range(10)], samples_per_insert=2)
    replay.sample(4, version=0)
    restored = ReplayBuffer(capacity=10, max_staleness=0, seed=99)
    restored.restore(replay.state())
    assert [names(restored.sample(3, 0)) for _ in range(4)] == [names(replay.sample(3, 0)) for _ in range(4)]


def test_the_state_holds_no_scores():
    replay = ReplayBuffer(capacity=10, max_staleness=0)
    replay.add([row(0)])
    assert replay.state()["rows"][0].scores is None


def test_bounds_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="capacity 0"):
        ReplayBuffer(capacity=0, max_staleness=0)
    with pytest.raises(ValueError, match="samples_per_insert 0"):
        ReplayBuffer(capacity=1, max_staleness=0).add([row(0)], samples_per_insert=0)
