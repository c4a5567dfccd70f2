"""Answers in free text, written by a model in a process of its own, which gives every device back when it ends."""

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, ParamSpec, TypeVar

from pydantic import Field

from raykd.records import Prompt, Rollout, Source
from raykd.rollout.config import EngineSettings
from raykd.rollout.requests import GenerationRequest
from raykd.value import Value

P = ParamSpec("P")
R = TypeVar("R")

BATCH = 32
"""Sequences that transformers writes together."""


class Decoding(Value):
    """Sampling at temperature 1 from the whole distribution."""

    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    """One answer to every question for each; MiniLLM's values."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """No run of so many tokens twice in prompt and answer; 0: MiniLLM's and DistiLLM's papers, 6: their public code. vLLM has no
    such rule, so transformers writes the answers then, one batch after another."""


def in_own_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """``function(...)`` in a new process: its errors come back, its memory and devices are free when this returns."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM says where it binds memory to
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_quieten) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process of {function.__name__} died; most often it had too little memory") from error


def write(
    model: str, engine: EngineSettings, decoding: Decoding, eos_ids: Sequence[int], asked: Sequence[tuple[Prompt, int]]
) -> list[list[Rollout]]:
    """For each seed the answer to every prompt, of at most so many tokens. An answer depends on seed and prompt alone."""
    written = write_with_transformers if decoding.no_repeat_ngram_size else write_with_vllm
    return written(model, engine, decoding, eos_ids, asked)


def write_with_vllm(
    model: str, engine: EngineSettings, decoding: Decoding, eos_ids: Sequence[int], asked: Sequence[tuple[Prompt, int]]
) -> list[list[Rollout]]:
    """All seeds in one continuous batch."""
    from raykd.rollout.worker import RolloutWorker

    worker = RolloutWorker(model, engine, eos_ids)

    async def answer(prompt: Prompt, max_tokens: int, seed: int) -> Rollout:
        request = GenerationRequest(prompt_id=prompt.id, sample=0, prompt_tokens=prompt.tokens, salt=seed)
        (rollout,) = await worker.generate([request], teacher_share=0.0, max_tokens=max_tokens)
        return rollout

    async def answer_all() -> list[Rollout]:
        return await asyncio.gather(*(answer(*question, seed) for seed in decoding.seeds for question in asked))

    try:
        rollouts = asyncio.run(answer_all())
    finally:
        worker.close()
    return [rollouts[start : start + len(asked)] for start in range(0, len(rollouts), len(asked))]


def write_with_transformers(
    model: str, engine: EngineSettings, decoding: Decoding, eos_ids: Sequence[int], asked: Sequence[tuple[Prompt, int]]
) -> list[list[Rollout]]:
    """As the papers' public code does: one generator for all rows, a batch is over when its last answer is."""
    import torch

    from raykd.packing import keep_softcap
    from raykd.pretrained import load_model

    writer = load_model(model, dtype=getattr(torch, engine.dtype)).eval()
    keep_softcap(writer)
    writer.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]  it lost its signature
    padding_rows = list(range(engine.vocab_size or writer.config.vocab_size, writer.config.vocab_size))
    rules = {
        "do_sample": True,
        "top_k": 0,
        "no_repeat_ngram_size": decoding.no_repeat_ngram_size,
        "suppress_tokens": padding_rows or None,
        "eos_token_id": list(eos_ids),
        "pad_token_id": eos_ids[0],
    }
    by_length = sorted(range(len(asked)), key=lambda index: len(asked[index][0].tokens))
    written = []
    for seed in decoding.seeds:
        torch.manual_seed(seed)
        answers: dict[int, Rollout] = {}
        for start in range(0, len(by_length), BATCH):
            batch = by_length[start : start + BATCH]
            answers |= zip(batch, _write_batch(writer, rules, eos_ids, [asked[index] for index in batch]), strict=True)
        written.append([answers[index] for index in range(len(asked))])
    return written


def _write_batch(
    writer: Any, rules: dict[str, Any], eos_ids: Sequence[int], batch: Sequence[tuple[Prompt, int]]
) -> list[Rollout]:
    import torch
    from transformers import GenerationConfig

    width = max(len(prompt.tokens) for prompt, _ in batch)
    pads = [width - len(prompt.tokens) for prompt, _ in batch]
    ids = [[eos_ids[0]] * pad + [*prompt.tokens] for pad, (prompt, _) in zip(pads, batch, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    # The model's own replaces whatever is left unset, so it is this one.
    writer.generation_config = GenerationConfig(max_new_tokens=max(limit for _, limit in batch), **rules)
    with torch.inference_mode():
        tokens = writer.generate(torch.tensor(ids, device=writer.device), attention_mask=torch.tensor(mask, device=writer.device))
    answers = tokens[:, width:].tolist()
    return [_rollout(prompt, answer[:limit], eos_ids) for (prompt, limit), answer in zip(batch, answers, strict=True)]


def _quieten() -> None:
    """No progress bars of loading, no warnings about what the libraries call of each other."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # that there is none


def _rollout(prompt: Prompt, tokens: list[int], eos_ids: Sequence[int]) -> Rollout:
    end = next((place for place, token in enumerate(tokens, 1) if token in eos_ids), None)
    return Rollout(
        prompt_id=prompt.id,
        sample=0,
        prompt_tokens=prompt.tokens,
        tokens=tuple(tokens[:end]),
        source=Source.STUDENT,
        finished=end is not None,
    )
