"""Hidden states through vLLM's pooling engine: tensor parallelism, and every quantised checkpoint that vLLM reads."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from raykd.engine import STEPPING, prepare, start
from raykd.experiment import TeacherConfig
from raykd.records import Rollout
from raykd.teacher.heads import head_in_checkpoint

Text = tuple[int, ...]


class PooledStates:
    """vLLM's continuous batching of prefills. A text that begins like another, as the responses of a prompt do, takes that part
    from the KV cache.

    vLLM returns no states of what it takes from there: by itself it therefore never looks into the cache for such requests. Here
    it may, since most of a prompt's states are not needed; those of its last token, and of a response's beginning that others
    share, are the states of the text that put them there.
    """

    def __init__(self, model: str, config: TeacherConfig, max_length: int | None) -> None:
        """``max_length``: of prompt and response; None: what the model takes."""
        self.head = head_in_checkpoint(model, getattr(torch, config.dtype))
        prepare()
        from vllm.config import PoolerConfig
        from vllm.platforms import current_platform

        engine = config.engine.model_copy(update={"dtype": config.dtype, "threads": config.threads})
        arguments: dict[str, Any] = {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
            "hf_overrides": {"head_dtype": "model"},  # states stay as they are
            "max_model_len": max_length,
            "max_num_batched_tokens": config.batch_tokens,
        }
        if current_platform.is_cpu():
            refuse_overflowing(model)
            arguments["worker_extension_cls"] = "raykd.engine.small_heads.WorkerExtension"
        else:  # graphs of all engines of a process share their memory, and the next engine to start deletes them
            arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
        engine = engine.model_copy(update={"max_sequences": min(engine.max_sequences, config.batch_tokens)})

        def begin() -> Any:
            with STEPPING:
                return start(model, engine, arguments)

        # Whoever starts the engine steps it: a thread has a CUDA stream of its own, and vLLM keeps that of the start.
        self._thread = ThreadPoolExecutor(1, "vllm-states")
        self._engine = self._thread.submit(begin).result()

    def of(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return self._thread.submit(self._of, rollouts).result()

    def _of(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        wanted = [(_read(rollout), _predictors(rollout)) for rollout in rollouts]
        begins: dict[Text, int] = {}
        """Where each text's needed states begin."""
        for text, positions in wanted:
            if positions:
                begins[text] = min(positions[0], begins.get(text, len(text)))
        self._engine.reset_prefix_cache()  # whatever is taken from it was then read in this call
        states: dict[Text, Tensor] = {}
        for text, tail in self._ends(sorted(begins), cached=True).items():  # those of one prompt together
            states[text] = _completed(text, tail, begins[text], states)
        states |= self._ends([text for text, tail in states.items() if _start(text, tail) > begins[text]], cached=False)
        none = torch.empty(0, self.head.weight.shape[1], dtype=self.head.weight.dtype)
        return [
            states[text][[position - _start(text, states[text]) for position in positions]] if positions else none
            for text, positions in wanted
        ]

    def answer(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int], vocab_size: int
    ) -> list[tuple[int, ...]]:
        return self._thread.submit(self._answer, prompts, max_tokens, eos_ids, vocab_size).result()

    def _answer(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int], vocab_size: int
    ) -> list[tuple[int, ...]]:
        """Token by token: the cache has the rest of each text."""
        head, generator = self.head.cut(vocab_size), torch.Generator().manual_seed(0)
        answers: list[Text] = [()] * len(prompts)
        for _ in range(max_tokens):
            unfinished = [i for i, answer in enumerate(answers) if not answer or answer[-1] not in eos_ids]
            texts = [(*prompts[i], *answers[i]) for i in unfinished]
            if not texts:
                break
            ends = self._ends(texts, cached=True)
            law = head(torch.stack([ends[text][-1] for text in texts])).softmax(-1)
            for i, token in zip(unfinished, law.multinomial(1, generator=generator)[:, 0].tolist(), strict=True):
                answers[i] = (*answers[i], token)
        return answers

    def _ends(self, texts: Iterable[Text], *, cached: bool) -> dict[Text, Tensor]:
        """The states of all of each text, or, with ``cached``, of what the cache does not have of it: its last token at least."""
        from vllm import PoolingParams

        asked = dict(enumerate(dict.fromkeys(texts)))
        with STEPPING:
            for index, text in asked.items():
                prompt: Any = {"type": "token", "prompt_token_ids": list(text)}
                params = PoolingParams(task="token_embed", use_activation=False, skip_reading_prefix_cache=not cached)
                self._engine.add_request(str(index), prompt, params)
        ends = dict.fromkeys(asked.values(), torch.empty(0))  # in the order of reading
        while self._engine.has_unfinished_requests():
            with STEPPING:
                outputs: list[Any] = self._engine.step()
            for output in outputs:
                text, states = asked[int(output.request_id)], output.outputs.data
                assert _start(text, states) == output.num_cached_tokens, "vLLM returns another part of a text than is known"
                ends[text] = states
        return ends


def refuse_overflowing(model: str) -> None:
    """Raises ValueError for activations of 8-bit integers on a processor whose products of them overflow: oneDNN sums pairs in 16
    bits where there is no VNNI."""
    quantised = getattr(AutoConfig.from_pretrained(model), "quantization_config", None) or {}
    groups = [group.get("input_activations") or {} for group in quantised.get("config_groups", {}).values()]
    if any(group.get("type") == "int" for group in groups) and not torch.cpu._is_vnni_supported():
        raise ValueError(
            f"{model} has activations of 8-bit integers, whose products overflow on this processor, which has no VNNI; take "
            "another machine, or set teachers.backend to transformers"
        )


def _start(text: Text, tail: Tensor) -> int:
    """The position of the first of its last states."""
    return len(text) - len(tail)


def _completed(text: Text, tail: Tensor, begin: int, states: dict[Text, Tensor]) -> Tensor:
    """The states of ``text`` from ``begin`` on: ``tail``, preceded by those of a text that was read before and begins alike."""
    taken = _start(text, tail)
    if taken <= begin:
        return tail
    for other, known in states.items():
        if _start(other, known) <= begin and other[:taken] == text[:taken]:
            return torch.cat([known[begin - _start(other, known) : taken - _start(other, known)], tail])
    return tail


def _read(rollout: Rollout) -> Text:
    """The tokens of a rollout that the teacher reads: all but the last, which predicts nothing."""
    return (*rollout.prompt_tokens, *rollout.tokens[:-1]) or rollout.tokens


def _predictors(rollout: Rollout) -> list[int]:
    """The position that predicts each token of the response."""
    return [max(0, len(rollout.prompt_tokens) - 1 + slot) for slot in range(len(rollout.tokens))]
