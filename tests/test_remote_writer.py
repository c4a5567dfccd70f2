import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from raykd.actors import RemoteWriter


class Replica:
    """What a writer sees of an actor; it answers with the seeds once it is told to."""

    def __init__(self) -> None:
        self.messages, self.answering = [], asyncio.Event()
        self.complete = SimpleNamespace(remote=self._complete)

    async def _complete(self, turns, max_tokens):
        self.messages.append((max_tokens, [session for _, _, session in turns]))
        await self.answering.wait()
        return [seed for _, seed, _ in turns]


async def begin(writer: RemoteWriter, max_tokens: int, seeds: range) -> list[asyncio.Task[int]]:
    turns = [asyncio.create_task(writer.complete([1], max_tokens, seed, session=str(seed))) for seed in seeds]
    await asyncio.sleep(0.05)
    return turns


async def write_together():
    replica: Any = Replica()
    writer = RemoteWriter([replica])
    short, long = await asyncio.gather(begin(writer, 1, range(3)), begin(writer, 2, range(3, 5)))
    later = await begin(writer, 1, range(5, 6))
    replica.answering.set()
    return replica.messages, await asyncio.gather(*short, *long, *later)


def test_turns_of_one_length_that_begin_together_travel_together():
    messages, answers = asyncio.run(write_together())
    assert sorted(messages) == [(1, ["0", "1", "2"]), (1, ["5"]), (2, ["3", "4"])]
    assert answers == [0, 1, 2, 3, 4, 5]


async def give_one_up():
    replica: Any = Replica()
    turns = await begin(RemoteWriter([replica]), 1, range(3))
    turns[0].cancel()
    replica.answering.set()
    with pytest.raises(asyncio.CancelledError):
        await turns[0]
    return await asyncio.gather(*turns[1:])


def test_a_turn_that_is_given_up_leaves_its_company_alone():
    assert asyncio.run(give_one_up()) == [1, 2]
