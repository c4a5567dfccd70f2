"""The replay buffer: exact epochs, bounds that hold, a state that resumes."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raykd.algorithms import GKD, SFT
from raykd.algorithms.base import Author, Replay
from raykd.experiment import Stage
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


def buffer(**bounds: object) -> ReplayBuffer:
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


def test_rows_older_than_max_age_are_not_given_out_but_data_never_grows_old():
    replay = buffer(max_age=2)
    replay.add([row(0, version=3), row(1, version=4), row(2, version=5), row(3, version=0, source=Source.DATASET)])
    assert sorted(names(replay.sample(10, version=6))) == ["1", "2", "3"]


def test_teacher_mixed_rows_are_the_students_share():
    replay = buffer(shares={Source.STUDENT: 0.5, Source.DATASET: 0.5})
    replay.add([row(i, source=Source.MIXED if i < 4 else Source.DATASET) for i in range(32)])
    drawn = [replay.sample(8, version=0) for _ in range(5)]
    assert all(sum(r.rollout.source is Source.MIXED for r in batch) == 4 for batch in drawn)


def test_a_restored_buffer_continues_where_the_saved_one_was():
    replay = buffer(samples_per_insert=2)
    replay.add([row(i) for i in range(10)])
    replay.sample(4, version=0)
    restored = ReplayBuffer(seed=99)
    restored.restore(replay.state())
    assert [names(restored.sample(3, 0)) for _ in range(4)] == [names(replay.sample(3, 0)) for _ in range(4)]


def test_rows_go_on_under_other_bounds():
    replay = buffer(capacity=4, samples_per_insert=1)
    replay.add([row(i) for i in range(4)])
    replay.restore(replay.state())
    replay.bound(Replay(capacity=8, samples_per_insert=2))
    replay.add([row(i) for i in range(4, 8)])
    drawn = [name for _ in range(3) for name in names(replay.sample(4, version=0))]
    assert Counter(drawn) == {str(i): 1 + (i >= 4) for i in range(8)}


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


WRITERS: list[Author] = [Source.DATASET, Source.STUDENT, Source.TEACHER]


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(0, 7), min_size=3, max_size=3).filter(any),
    batches=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    seed=st.integers(0, 5),
)
def test_shares_are_exact_but_for_one_row_over_any_batches(weights: list[int], batches: list[int], seed: int):
    shares: dict[Author, float] = {writer: weight / sum(weights) for writer, weight in zip(WRITERS, weights, strict=True)}
    replay = ReplayBuffer(seed)
    replay.begin(Replay(shares=shares))
    replay.add([row(i, source=WRITERS[i % 3] if i % 6 != 1 else Source.MIXED) for i in range(60)])
    counts: Counter[Source] = Counter()
    for count in batches:
        batch = replay.sample(count, version=0)
        assert len(set(names(batch))) == len(batch) == count
        counts.update(Source.STUDENT if r.rollout.source is Source.MIXED else r.rollout.source for r in batch)
    for writer, share in shares.items():
        assert abs(counts[writer] - share * sum(batches)) < 1 + 1e-6
        assert share > 0 or counts[writer] == 0


@settings(deadline=None)
@given(
    phases=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20),
    capacity=st.integers(1, 15),
    uses=st.one_of(st.none(), st.integers(1, 3)),
    staleness=st.one_of(st.none(), st.integers(0, 3)),
    shares=st.sampled_from([None, {Source.STUDENT: 0.25, Source.DATASET: 0.75}]),
)
def test_no_bound_is_ever_broken(phases, capacity, uses, staleness, shares):
    replay, added, counts = (
        buffer(capacity=capacity, samples_per_insert=uses, max_age=staleness, shares=shares),
        0,
        Counter(),
    )
    for version, (new, drawn) in enumerate(phases):
        replay.add([row(added + i, version, WRITERS[(added + i) % 2]) for i in range(new)])
        added += new
        held = replay.held(version)
        batch = replay.sample(drawn, version)
        counts.update(names(batch))
        assert held <= capacity and len(set(names(batch))) == len(batch) == min(drawn, held)
        for drawn_row in batch:
            left_by_age_alone = uses is None and staleness is None
            assert not left_by_age_alone or int(drawn_row.rollout.prompt_id) >= added - capacity
            fresh = staleness is None or version - drawn_row.rollout.version <= staleness
            assert fresh or drawn_row.rollout.source is Source.DATASET
            assert drawn_row.scores == f"reference {drawn_row.rollout.prompt_id}"
    assert uses is None or max(counts.values(), default=0) <= uses


def test_a_writer_with_too_few_rows_is_stood_in_for():
    replay = buffer(shares={Source.STUDENT: 0.5, Source.DATASET: 0.5})
    replay.add([row(i) for i in range(8)] + [row(8, source=Source.DATASET)])
    batch = replay.sample(6, version=0)
    assert Counter(r.rollout.source for r in batch) == {Source.STUDENT: 5, Source.DATASET: 1}


def test_a_restored_buffer_owes_the_same_rows():
    replay = buffer(shares={Source.STUDENT: 0.3, Source.DATASET: 0.7})
    replay.add([row(i, source=WRITERS[i % 2]) for i in range(40)])
    replay.sample(4, version=0)
    restored = ReplayBuffer(seed=99)
    restored.restore(replay.state())
    assert [names(restored.sample(3, 0)) for _ in range(9)] == [names(replay.sample(3, 0)) for _ in range(9)]


def test_a_stage_may_keep_responses_longer_than_its_algorithm():
    stage = Stage(algorithm=GKD(), steps=4, batch_size=8, replay=Replay(capacity=64, samples_per_insert=3))
    assert stage.steps_per_phase == 3 and stage.bounds.capacity == 64
    with pytest.raises(ValidationError, match=r"phase writes 8, and the last of them is used 5 steps later"):
        Stage(algorithm=GKD(), steps=4, batch_size=8, max_staleness=1, replay=Replay(samples_per_insert=3, max_age=4))
    with pytest.raises(ValidationError, match=r"names teacher, which SFT has nobody write"):
        Stage(algorithm=SFT(), steps=4, replay=Replay(shares={Source.DATASET: 0.5, Source.TEACHER: 0.5}))
    with pytest.raises(ValidationError, match="sum to 1"):
        Replay(shares={Source.DATASET: 0.5})


@pytest.mark.stack
def test_scores_that_memory_has_no_room_for_are_spilled_and_come_back_as_they_were():
    """Ray's own doing; this is what the buffer's bounded memory stands on."""
    ray.shutdown()  # of the tests before
    ray.init("local", object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    try:
        replay: Any = ray.remote(ReplayBuffer).options(num_cpus=0).remote()
        ray.get(replay.begin.remote(Replay()))
        blocks = 16
        for i in range(blocks):  # 256 MiB of scores in a store of 80 MiB
            scores = ray.put(np.random.default_rng(i).integers(0, 256, 16 << 20, dtype=np.uint8))
            ray.get(replay.add.remote([replace(row(i), scores=scores)]))
            del scores
        for _ in range(2):  # drawn again: no teacher pass, the same reference
            for drawn in ray.get(replay.sample.remote(blocks, 0)):
                expected = np.random.default_rng(int(drawn.rollout.prompt_id)).integers(0, 256, 16 << 20, dtype=np.uint8)
                assert np.array_equal(ray.get(drawn.scores), expected)
    finally:
        ray.shutdown()


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"samples_per_insert": 0}, {"max_age": -1}])
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Replay.model_validate(wrong)
