"""One vLLM engine: token ids in, token ids and log-probs out, weights replaced in place."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from raykd.engine import prepare, start
from raykd.rollout.config import EngineSettings
from raykd.rollout.engine_thread import EngineThread
from raykd.rollout.requests import Completion
from raykd.rollout.sessions import SCORED, Scores
from raykd.weights import Bucket, WeightUpdate, refuse_overwritten, verify

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams

CPU_SAMPLER = "raykd_seed_and_temperature"
"""In a request's ``extra_args``, for ``cpu_sampler``: temperature 0 takes the most likely token."""

AT_ONCE = 8
"""Tokens scored as a piece is read, at most: each has logits ``[V]`` then."""


class VllmEngine:
    """Continuous batching of completions and scores; the same code on GPU and CPU.

    On one device the model lives in this process, stepped by a thread of its own; with ``tensor_parallel > 1`` vLLM
    starts a process per device. Sampling is from the whole softmax, no truncation. A response depends on its prompt,
    weights, temperature and seed alone; other requests of a batch can only change the rounding of its logits.
    """

    def __init__(self, model: str, config: EngineSettings, eos_token_ids: Sequence[int]) -> None:
        self._config = config
        self._eos_token_ids = list(eos_token_ids)
        self._thread = EngineThread(lambda: start_engine(model, config))
        rows: int = self._thread.exclusive(lambda engine: engine.model_config.get_vocab_size()).result()
        self.gpus: list[str | None] = self._thread.exclusive(lambda engine: engine.collective_rpc("own_gpu")).result()
        """UUIDs, None on CPU: one of each device."""
        self._vocab_size = config.vocab_size or rows
        if not eos_token_ids or not 0 <= min(eos_token_ids) <= max(eos_token_ids) < self._vocab_size:
            self.close()
            raise ValueError(f"eos_token_ids must name tokens within [0, {self._vocab_size}), got {self._eos_token_ids}")

    async def complete(
        self,
        text: Sequence[int],
        max_tokens: int,
        seed: int,
        *,
        session: str | None = None,
        score_from: int | None = None,
        temperature: float = 1.0,
    ) -> Completion:
        """Continue ``text`` until EOS or for ``max_tokens``, after scoring its tokens from position ``score_from`` on.

        Temperature 0 takes the most likely tokens.
        ``session`` names a text that will be continued again: its KV cache is kept until ``forget``.
        """
        self._check(text, len(text) + max_tokens)
        if score_from is None:
            score_from = len(text)
        elif not 0 < score_from <= len(text):
            raise ValueError(f"cannot score from position {score_from} of {len(text)} tokens: the first needs a token before it")
        if not max_tokens and score_from == len(text):
            raise ValueError("nothing is asked: max_tokens is 0 and there is no token to score")
        end = len(text) if max_tokens else len(text) - 1
        before = range(score_from, end)
        pieces = [(place, self._params(seed, 1, temperature=0.0, asked=text[place])) for place in before]
        if max_tokens:
            asked = None if session is None else 0
            last = self._params(seed, max_tokens, temperature=temperature, asked=asked, scores=before[-AT_ONCE:])
        else:
            last = self._params(seed, 1, temperature=0.0, asked=text[end], scores=before[-AT_ONCE:])
        pieces.append((end, last))
        written = await self._answer(self._thread.submit(list(text), pieces, session), "a completion")
        assert written.scored is not None
        if not max_tokens:
            return Completion((), (), False, scored=(*written.scored, written.logprobs[0][1]))
        logprobs = tuple(own for own, *_ in written.logprobs)
        return Completion(tuple(written.tokens), logprobs, written.stopped, tuple(written.scored))

    async def forget(self, session: str) -> None:
        """The text of a session is complete."""
        self._thread.end_session(session)

    async def load(self, update: WeightUpdate) -> int:
        """Check all buckets, then replace the weights once no request is in flight; returns the version.

        A damaged bucket raises ValueError before anything changes. Requests queued meanwhile wait and see the new weights.
        """
        await check(update)
        return await self.install(update)

    async def install(self, update: WeightUpdate, *, in_flight: bool = False) -> int:
        """``load`` after the check; ``in_flight``: at once, and what is being written is written on by the new weights."""
        replaced = self._thread.update(lambda engine: replace_weights(engine, update.buckets), in_flight=in_flight)
        await self._answer(replaced, f"the weights of version {update.version}")
        return update.version

    async def sleep(self) -> None:
        """Give the GPU memory back once no request is in flight; the next request, update or look wakes the engine first.

        Texts of sessions are forgotten. Takes ``sleep`` in the engine's settings, on a GPU.
        """
        if not self._config.sleep:
            raise ValueError("this engine was started without sleep mode: set sleep in its settings")
        await self._answer(self._thread.sleep(), "the wish to sleep")

    async def inspect(self, function: "Callable[[LLMEngine], Any]") -> Any:
        """Run a function on vLLM's engine between batches."""
        return await self._answer(self._thread.exclusive(function), "a look at the engine")

    def close(self) -> None:
        """Stop the engine and release its memory."""
        self._thread.close()

    def _params(
        self,
        seed: int,
        max_tokens: int,
        *,
        asked: int | None,
        scores: range = range(0),
        temperature: float = 1.0,
    ) -> "SamplingParams":
        """``asked``: a token whose log-prob is wanted beside that of each token sampled; ``scores``: positions read before."""
        from vllm import SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        on_cpu = current_platform.is_cpu()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if on_cpu else temperature,  # of vLLM's sampler, which would keep a generator for each seed
            seed=seed,
            extra_args={CPU_SAMPLER: (seed, temperature), SCORED: (scores.start, scores.stop)} if on_cpu else None,
            logprobs=0 if asked is None else None,
            logprob_token_ids=None if asked is None else [asked],
            flat_logprobs=True,
            stop_token_ids=self._eos_token_ids,
            ignore_eos=True,  # the checkpoint's own EOS; ours are the stop tokens
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    async def _answer(self, future: Future[Any], what: str) -> Any:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._config.deadline_s)
        except TimeoutError:
            raise TimeoutError(
                f"vLLM gave no answer to {what} within {self._config.deadline_s:g} s; raise deadline_s or use more replicas"
            ) from None

    def _check(self, tokens: Sequence[int], length: int) -> None:
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            raise ValueError(f"tokens must be at least one, all within [0, {self._vocab_size}); got {list(tokens)[:8]}...")
        if length > self._config.max_length:
            raise ValueError(
                f"{length} tokens (prompt and response) exceed max_length {self._config.max_length} of the engine: "
                "raise max_length or shorten the prompt or max_tokens"
            )


def start_engine(model: str, config: EngineSettings) -> "tuple[LLMEngine, Scores | None]":
    """Start vLLM in the calling thread, ready for new weights; where its sampler puts the scores of what it reads, if it does."""
    prepare()
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    from raykd.rollout.weight_receiver import BACKEND, WorkerExtension

    arguments: dict[str, Any] = {
        "generation_config": "vllm",
        "hf_overrides": {"head_dtype": "float32"},  # log-probs as exact as the learner's, whatever the dtype of the layers
        "max_model_len": config.max_length,
        "seed": config.seed,
        "logprobs_mode": "raw_logprobs",
        "enable_sleep_mode": config.sleep,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    }
    if current_platform.is_cpu() and config.tensor_parallel == 1:  # other processes ask for it before they could import it
        from raykd.rollout.cpu_norms import PROVIDER

        arguments["ir_op_priority"] = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
    engine = start(model, config, arguments)
    engine.collective_rpc("init_weight_transfer_engine", args=({"vocab_size": config.vocab_size},))
    scores = engine.collective_rpc("sample_by_seed") if current_platform.is_cpu() else []
    return engine, scores[0] if len(scores) == 1 else None  # those of other processes stay there


async def check(update: WeightUpdate) -> None:
    """Raise ValueError where a bucket is not as it was published; in threads, which leave the event loop free."""
    await asyncio.gather(*(asyncio.to_thread(verify, bucket) for bucket in update.buckets))


def replace_weights(engine: "LLMEngine", buckets: Sequence[Bucket]) -> None:
    """Load all buckets. A ValueError leaves weights of both versions."""
    engine.collective_rpc("start_weight_update")
    for bucket in buckets:
        engine.collective_rpc("update_weights", args=({"bucket": bucket},))
    engine.collective_rpc("finish_weight_update")
    for bucket in buckets:
        refuse_overwritten(bucket)
