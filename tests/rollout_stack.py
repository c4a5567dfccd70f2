"""Engines and models the rollout tests share: each is started once in a session, all run on one event loop."""

import asyncio
import atexit
import os
import tempfile
from collections.abc import Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config
from transformers.core_model_loading import revert_weight_conversion

from raykd.engine.starting import prepare
from raykd.rollout.config import EngineSettings
from raykd.rollout.vllm_engine import VllmEngine
from raykd.rollout.worker import RolloutWorker
from raykd.weights import Shelves, WeightUpdate

STORIES = str(Path(os.environ["RAYKD_DATA"]) / "models" / "stories260K")
STORIES_EOS = 2
TINY_VOCABULARY, TINY_ROWS, TINY_EOS = 12, 16, 11

_LOOP = asyncio.new_event_loop()
_LENDERS: WeakKeyDictionary[WeightUpdate, Shelves] = WeakKeyDictionary()
"""The memory of an update lives as long as the update."""


def wait(work: Coroutine[Any, Any, Any]) -> Any:
    """Its result, from the one loop of all tests."""
    return _LOOP.run_until_complete(work)


@cache
def folder(name: str) -> str:
    """A small random model on disk; its weights are large, so that its distributions are far from flat."""
    torch.manual_seed({"teacher": 1, "tiny-p": 2, "tiny-q": 3, "gpt2": 4, "qwen2": 5}[name])
    path = Path(_scratch().name) / name
    AutoModelForCausalLM.from_config(_config(name)).save_pretrained(path)
    return str(path)


def _config(name: str) -> PretrainedConfig:
    ends = {"bos_token_id": 1, "eos_token_id": TINY_EOS if "tiny" in name else STORIES_EOS, "initializer_range": 0.15}
    if name == "gpt2":  # biases, transposed matrices, and a head that is the embedding itself
        return GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=512, **ends)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    if name == "qwen2":  # biases of the stacked projection, a tied head
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
        return Qwen2Config(**sizes, **layers, tie_word_embeddings=True, **ends)
    vocab_size, hidden_size = (512, 64) if name == "teacher" else (TINY_ROWS, 32)
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 128}
    return LlamaConfig(**sizes, **layers, tie_word_embeddings=False, **ends)


@cache
def worker(model: str) -> RolloutWorker:
    inspect_here()
    started = RolloutWorker(model, engine_config(model), eos_of(model))
    atexit.register(started.close)
    return started


@cache
def inspect_here() -> None:
    """vLLM looks at each class of models in a process of its own, which imports everything anew; tests load it here anyway."""
    prepare()
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def new_engine(model: str, **settings: Any) -> VllmEngine:
    inspect_here()
    return VllmEngine(model, engine_config(model).model_copy(update=settings), eos_of(model))


def engine_config(model: str) -> EngineSettings:
    vocab_size = TINY_VOCABULARY if "tiny" in model else 512
    return EngineSettings(dtype="float32", max_length=256, vocab_size=vocab_size, cpu_cache_gib=0.1)


def eos_of(model: str) -> tuple[int, ...]:
    return (TINY_EOS if "tiny" in model else STORIES_EOS,)


@cache
def reference(model: str) -> PreTrainedModel:
    """The same model in Hugging Face's own code."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, tokens: Sequence[int], start: int) -> torch.Tensor:
    """log-softmax over the true vocabulary at the positions that predict ``tokens[start:]``; [T, V]."""
    vocab_size = TINY_VOCABULARY if model.config.vocab_size == TINY_ROWS else model.config.vocab_size
    logits = model(torch.tensor([list(tokens)])).logits[0, start - 1 : -1, :vocab_size]
    return logits.float().log_softmax(-1)


def chosen_logprobs(model: PreTrainedModel, tokens: Sequence[int], start: int) -> torch.Tensor:
    """Of ``tokens[start:]``; [T]."""
    return reference_logprobs(model, tokens, start).gather(-1, torch.tensor(list(tokens[start:]))[:, None])[:, 0]


@torch.no_grad()
def perturbed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy with every parameter changed."""
    generator = torch.Generator().manual_seed(seed)
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for parameter in copy.parameters():
        parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return copy


def publish(model: PreTrainedModel, version: int, shelves: Shelves | None = None) -> WeightUpdate:
    """What a learner sends: each parameter once, named as in a checkpoint, so no head where it is tied; four to a bucket."""
    named = sorted(revert_weight_conversion(model, dict(model.named_parameters())).items())
    groups = (named[first : first + 4] for first in range(0, len(named), 4))
    shelves = shelves or Shelves()
    update = shelves.publish(version, groups, [tensor.nbytes for _, tensor in named])
    _LENDERS[update] = shelves
    return update


@cache
def _scratch() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()
