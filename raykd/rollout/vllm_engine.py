"""One vLLM engine: token ids in, token ids and log-probs out, weights replaced in place."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from raykd.rollout.config import EngineSettings
from raykd.rollout.engine_thread import EngineThread
from raykd.rollout.requests import Completion
from raykd.weights import Bucket, WeightUpdate, verify

if TYPE_CHECKING:
    from vllm import LLMEngine

# vLLM on CPU replaces torch.set_num_threads by a function that does nothing; this is the real one.
_set_num_threads = torch.set_num_threads

CPU_STEP_TOKENS = 4096
"""Tokens of one step of the engine on CPU."""
CPU_BLOCK_SIZE = 32
"""Tokens in a block of the KV cache on CPU: the smallest its kernels take, so that most of a prefix is found cached."""


class VllmEngine:
    """Continuous batching of completions and scores; the same code on GPU and CPU.

    On one device the model lives in this process, stepped by a thread of its own; with ``tensor_parallel > 1`` vLLM
    starts a process per device. Sampling is from the plain softmax: temperature 1, no truncation. A response depends on
    its prompt, weights and seed alone; other requests of a batch can only change the rounding of its logits.
    """

    def __init__(self, model: str, config: EngineSettings, eos_token_ids: Sequence[int]) -> None:
        self._config = config
        self._eos_token_ids = list(eos_token_ids)
        self._thread = EngineThread(lambda: start_engine(model, config))
        rows: int = self._thread.exclusive(lambda engine: engine.model_config.get_vocab_size()).result()
        self._vocab_size = config.vocab_size or rows
        if not eos_token_ids or not 0 <= min(eos_token_ids) <= max(eos_token_ids) < self._vocab_size:
            self.close()
            raise ValueError(f"eos_token_ids must name tokens within [0, {self._vocab_size}), got {self._eos_token_ids}")

    async def complete(self, tokens: Sequence[int], max_tokens: int, seed: int, *, greedy: bool = False) -> Completion:
        """Continue ``tokens`` until EOS or for ``max_tokens``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check(tokens, len(tokens) + max_tokens)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if greedy else 1.0,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=self._eos_token_ids,
            ignore_eos=True,  # the checkpoint's own EOS; ours are the stop tokens
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output: Any = await self._answer(self._thread.submit(list(tokens), params), "a completion")
        (written,) = output.outputs
        assert written.logprobs.token_ids == list(written.token_ids), "one log-prob a token, its own"
        return Completion(tuple(written.token_ids), tuple(written.logprobs.logprobs), written.finish_reason == "stop")

    async def score(self, tokens: Sequence[int], start: int) -> list[float]:
        """Log-probs of ``tokens[start:]``, each given all tokens before it: one prefill."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check(tokens, len(tokens))
        if not 0 < start < len(tokens):
            raise ValueError(f"cannot score from position {start} of {len(tokens)} tokens: the first needs a token before it")
        # All but the last token are prefilled, and the last one's log-prob is asked of the distribution after them, from
        # which one token is sampled and thrown away: this needs no more room than writing the text did.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=[tokens[-1]],
            prompt_logprobs=0 if start < len(tokens) - 1 else None,
            flat_logprobs=True,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output: Any = await self._answer(self._thread.submit(list(tokens[:-1]), params), "a score")
        of_prompt = output.prompt_logprobs.logprobs[start - 1 :] if output.prompt_logprobs is not None else []
        return [*of_prompt, output.outputs[0].logprobs[0][tokens[-1]].logprob]

    async def load(self, update: WeightUpdate, fetch: Callable[[Any], Bucket]) -> int:
        """Fetch and check all buckets, then replace the weights once no request is in flight; returns the version.

        A damaged bucket raises ValueError before anything changes. Requests queued meanwhile wait and see the new weights.
        """
        return await self.install(update.version, await fetch_buckets(update, fetch))

    async def install(self, version: int, buckets: Sequence[Bucket]) -> int:
        """``load`` with the buckets at hand."""
        replaced = self._thread.exclusive(lambda engine: replace_weights(engine, buckets), fatal=True)
        await self._answer(replaced, f"the weights of version {version}")
        return version

    async def inspect(self, function: "Callable[[LLMEngine], Any]") -> Any:
        """Run a function on vLLM's engine between batches."""
        return await self._answer(self._thread.exclusive(function), "a look at the engine")

    def close(self) -> None:
        """Stop the engine and release its memory."""
        self._thread.close()

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


def start_engine(model: str, config: EngineSettings) -> "LLMEngine":
    """Start vLLM in the calling thread; tensor-parallel workers get processes of their own."""
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler runs in our thread
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    from raykd.rollout.weight_receiver import BACKEND, WorkerExtension

    on_cpu: dict[str, Any] = {}
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas share the cores as the scheduler sees fit
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))  # for tensor-parallel workers
        _set_num_threads(config.threads)
        kv_cache_bytes = int(config.cpu_cache_gib * 2**30)
        on_cpu = {
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": kv_cache_bytes,
            # A prompt prefilled in pieces makes vLLM rewind the request's generator, which a CPU generator cannot do.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_STEP_TOKENS, config.max_length),
        }
    arguments = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        generation_config="vllm",
        hf_overrides={"head_dtype": "float32"},  # log-probs as exact as the learner's, whatever the dtype of the layers
        dtype=config.dtype,
        max_model_len=config.max_length,
        max_num_seqs=config.max_sequences,
        seed=config.seed,
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        gpu_memory_utilization=config.memory,
        enable_prefix_caching=True,
        logprobs_mode="raw_logprobs",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        **on_cpu,
    )
    engine = LLMEngine.from_engine_args(arguments)
    engine.collective_rpc("init_weight_transfer_engine", args=({"vocab_size": config.vocab_size},))
    return engine


async def fetch_buckets(update: WeightUpdate, fetch: Callable[[Any], Bucket]) -> list[Bucket]:
    """All buckets of an update, each checked, in threads that leave the event loop free."""

    def fetch_checked(reference: Any) -> Bucket:
        bucket = fetch(reference)
        verify(bucket)
        return bucket

    return [await asyncio.to_thread(fetch_checked, reference) for reference in update.buckets]


def replace_weights(engine: "LLMEngine", buckets: Sequence[Bucket]) -> None:
    """Load all buckets and forget what was computed with the old weights."""
    engine.collective_rpc("start_weight_update")
    for bucket in buckets:
        engine.collective_rpc("update_weights", args=({"bucket": bucket},))
    engine.collective_rpc("finish_weight_update")
    engine.reset_prefix_cache()
