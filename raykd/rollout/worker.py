"""A rollout replica: generate, load, sleep, close. Plain; whoever runs it in another process wraps it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext

from raykd.records import Rollout, Source
from raykd.rollout.config import EngineSettings
from raykd.rollout.mixing import mixed_response
from raykd.rollout.requests import GenerationRequest, Writer, derive_seed
from raykd.rollout.vllm_engine import VllmEngine, check
from raykd.weights import WeightUpdate


class RolloutWorker:
    """Writes responses as the student, the teacher or both.

    ``load`` waits until the responses in progress are written, and later ``generate`` calls wait for it: every response is
    written by one version of the student. Where it is told to load in flight, it waits for nothing, and a response in progress
    is written on by the new version; its own is then the one that began it, and each log-prob that of the token's writer.
    """

    def __init__(self, model: str, config: EngineSettings, eos_token_ids: Sequence[int]) -> None:
        self.version = 0
        self._seed = config.seed
        self.engine = VllmEngine(model, config, eos_token_ids)
        self._places = asyncio.Semaphore(config.max_sequences)  # texts that both engines keep between their turns
        self._turn = asyncio.Condition()
        self._num_generating = 0
        self._loading = False

    async def generate(
        self, requests: Sequence[GenerationRequest], teacher_share: float, max_tokens: int, teacher: Writer | None = None
    ) -> list[Rollout]:
        """One rollout a request, all written at once; an error in one is an error of the call."""
        if not 0 <= teacher_share <= 1:
            raise ValueError(f"teacher_share must be within [0, 1], got {teacher_share}")
        if teacher_share > 0 and teacher is None:
            raise ValueError(f"teacher_share is {teacher_share} but no teacher was given to write with")
        if teacher_share > 0 and (other := [request.temperature for request in requests if request.temperature != 1]):
            raise ValueError(f"temperature must be 1 where the teacher writes (teacher_share {teacher_share}), got {other[0]}")
        async with self._generating():
            responses = [self._write(request, teacher_share, max_tokens, teacher) for request in requests]
            writing = [asyncio.ensure_future(response) for response in responses]
            try:
                return list(await asyncio.gather(*writing))
            finally:
                for task in writing:
                    task.cancel()

    async def load(self, update: WeightUpdate, *, in_flight: bool = False) -> int:
        """Replace the student's weights; returns the version. Checking overlaps with generation, replacing does not."""
        await check(update)
        async with nullcontext() if in_flight else self._alone():
            self.version = await self.engine.install(update, in_flight=in_flight)
            return self.version

    async def sleep(self) -> None:
        """Give the GPU memory back, once the responses in progress are written; ``load`` and ``generate`` wake the engine."""
        async with self._alone():
            await self.engine.sleep()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """No response is in progress."""
        async with self._turn:
            await self._turn.wait_for(lambda: not self._loading)
            self._loading = True
        try:
            async with self._turn:
                await self._turn.wait_for(lambda: self._num_generating == 0)
            yield
        finally:
            async with self._turn:
                self._loading = False
                self._turn.notify_all()

    @asynccontextmanager
    async def _generating(self) -> AsyncIterator[None]:
        async with self._turn:
            await self._turn.wait_for(lambda: not self._loading)
            self._num_generating += 1
        try:
            yield
        finally:
            async with self._turn:
                self._num_generating -= 1
                self._turn.notify_all()

    async def _write(self, request: GenerationRequest, teacher_share: float, max_tokens: int, teacher: Writer | None) -> Rollout:
        version = self.version  # part of the seed: the same prompt asked of a new policy is a new draw
        seed = derive_seed(self._seed, request.salt, request.prompt_id, request.sample, version)
        if teacher is None or teacher_share == 0:
            response = await self.engine.complete(request.prompt_tokens, max_tokens, seed, temperature=request.temperature)
        else:
            async with self._places:
                response = await mixed_response(request.prompt_tokens, self.engine, teacher, teacher_share, max_tokens, seed)
        return Rollout(
            prompt_id=request.prompt_id,
            sample=request.sample,
            prompt_tokens=request.prompt_tokens,
            tokens=response.tokens,
            source={0.0: Source.STUDENT, 1.0: Source.TEACHER}.get(teacher_share, Source.MIXED),
            teacher_share=teacher_share,
            temperature=request.temperature,
            student_logprobs=response.logprobs,
            version=version,
            finished=response.finished,
        )
