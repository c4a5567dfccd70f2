"""The reward worker: a number for every response, by a user's function or a classifier."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raykd.experiment import ClassifierReward, FunctionReward, RewardConfig
from raykd.pretrained import load_model
from raykd.records import Rollout

Rate = Callable[[list[str], list[str]], Sequence[float]]
"""Prompts and responses to rewards."""


class Reward:
    """Decodes with the student's tokenizer, special tokens left out; larger is better."""

    def __init__(self, config: RewardConfig, tokenizer: str) -> None:
        self._name = config.name if isinstance(config, FunctionReward) else config.path
        self._rate = load_function(config.name) if isinstance(config, FunctionReward) else Classifier(config)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def rate(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One finite number a rollout; raises ValueError naming the first that is not."""
        prompts = self._tokenizer.batch_decode([list(r.prompt_tokens) for r in rollouts], skip_special_tokens=True)
        responses = self._tokenizer.batch_decode([list(r.tokens) for r in rollouts], skip_special_tokens=True)
        rewards = [float(reward) for reward in self._rate(prompts, responses)]
        if len(rewards) != len(rollouts):
            raise ValueError(f"reward {self._name} gave {len(rewards)} numbers for {len(rollouts)} responses")
        for reward, rollout, response in zip(rewards, rollouts, responses, strict=True):
            if not math.isfinite(reward):
                raise ValueError(f"reward {self._name} is {reward} for {rollout.prompt_id}, response {response[:80]!r}")
        return rewards


class Classifier:
    """log p(label | prompt + response); of a model with a single output, that output."""

    def __init__(self, config: ClassifierReward) -> None:
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(config.path)
        self._model: Any = load_model(config.path, AutoModelForSequenceClassification).eval()
        self._tokenizer.truncation_side = "left"  # the response is at the end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        if config.label >= self._model.config.num_labels:
            raise ValueError(f"reward.label {config.label}: {config.path} has {self._model.config.num_labels} labels")

    @torch.inference_mode()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(texts), self._config.batch_size):
            batch = texts[start : start + self._config.batch_size]
            inputs = self._tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            logits = self._model(**inputs).logits.float()
            scores = logits if logits.shape[-1] == 1 else logits.log_softmax(-1)
            rewards += scores[:, self._config.label].tolist()
        return rewards


def load_function(name: str) -> Rate:
    """``package.module:function`` or ``folder/file.py:function``; raises ValueError where there is none."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, Path(place).expanduser())
            assert spec is not None and spec.loader is not None, "a .py file has a loader"
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, OSError, AttributeError, SyntaxError, ValueError) as error:
        raise ValueError(f"reward.name {name} cannot be loaded: {error}") from error
