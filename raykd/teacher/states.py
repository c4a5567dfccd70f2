"""Where the teacher's hidden states come from: a back end reads texts, and knows the head that belongs to its states."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from raykd.experiment import TeacherConfig
from raykd.fused import fuse
from raykd.head import Head
from raykd.packing import can_pack, packed, padded
from raykd.pretrained import load_model
from raykd.records import Rollout
from raykd.student import verify_head
from raykd.teacher.heads import head_of


class States(Protocol):
    """A frozen model."""

    head: Head
    """Turns the states into logits; all rows, those beyond the vocabulary too."""

    def of(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """For each rollout the states ``[T, H]`` after the final norm of the positions that predict its response; for the first
        token of a text without a prompt, which nothing predicts, its own."""
        ...

    def answer(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int], vocab_size: int
    ) -> list[tuple[int, ...]]:
        """Answers of its own, sampled at temperature 1: a few, to be looked at."""
        ...


class PrefillStates:
    """Hugging Face's model, one forward pass over texts laid end to end where that gives the same states."""

    def __init__(self, model: str | PreTrainedModel, config: TeacherConfig, device: torch.device) -> None:
        """``model`` is a folder, a name on the Hub, or the model itself."""
        causal = model if isinstance(model, PreTrainedModel) else load_model(model, dtype=getattr(torch, config.dtype))
        causal.to(device)  # pyright: ignore[reportArgumentType]  transformers wraps it without its signature
        causal = causal.eval().requires_grad_(False)
        fuse(causal)
        self._causal: Any = causal  # its ``generate`` has no usable annotations
        self._lay = packed if can_pack(causal) else padded
        self._batch_tokens, self._device = config.batch_tokens, device
        # vLLM runs some architectures by transformers' own classes, and has these ask from then on whether they are compiled: an
        # engine that writes in this process would break a model that was there before.
        self._causal.get_decoder().do_not_compile = True
        self.head = head_of(causal)
        verify_head(causal, self.head, f"teacher {causal.name_or_path}")

    def of(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(rollouts)
        for batch in _batches(rollouts, self._batch_tokens, packs=self._lay is packed):
            prompts, responses = [rollouts[i].prompt_tokens for i in batch], [rollouts[i].tokens for i in batch]
            layout = self._lay(prompts, responses)
            states = layout.to(self._device).states(self._causal.base_model)
            for index, positions in zip(batch, layout.predictors, strict=True):
                found[index] = states[positions]
        return found

    def answer(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int], vocab_size: int
    ) -> list[tuple[int, ...]]:
        rules = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=max_tokens,
            eos_token_id=list(eos_ids),
            pad_token_id=eos_ids[0],
            suppress_tokens=list(range(vocab_size, len(self.head.weight))) or None,
        )
        torch.manual_seed(0)
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._device)
            written = self._causal.generate(ids, attention_mask=torch.ones_like(ids), generation_config=rules)
            answers.append(tuple(written[0, len(prompt) :].tolist()))
        return answers


def _batches(rollouts: Sequence[Rollout], batch_tokens: int, *, packs: bool) -> list[list[int]]:
    """Indices in batches of at most ``batch_tokens`` positions, or one rollout: packed, those of one prompt together; padded,
    those of similar length."""
    lengths = [rollout.length for rollout in rollouts]
    batches: list[list[int]] = []
    size = 0
    for index in sorted(range(len(rollouts)), key=lambda i: rollouts[i].prompt_tokens if packs else lengths[i]):
        grown = size + lengths[index] if packs else (len(batches[-1]) + 1 if batches else 1) * lengths[index]
        if not batches or grown > batch_tokens:
            batches.append([])
            grown = lengths[index]
        batches[-1].append(index)
        size = grown
    return batches
