"""Sampling from the plain softmax on CPU, one uniform number a token. vLLM's own sampler there draws one for every entry of the
vocabulary, a quarter of the time that a small model needs for a token.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from raykd.rollout.requests import derive_seed
from raykd.rollout.vllm_engine import CPU_SAMPLER

BLOCK = 256
"""Tokens looked up together."""


class SoftmaxSampler(LogitsProcessor):
    """Draws every token by the seed of its request and its place in the request's output."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[int, float, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, _request)

    def apply(self, logits: Tensor) -> Tensor:
        if self._requests:
            rows = list(self._requests)
            uniforms = torch.zeros(len(logits), dtype=torch.float64)
            uniforms[rows] = torch.tensor(
                [_uniform(seed, output) for seed, _, output in self._requests.values()], dtype=torch.float64
            )
            for row, (_, temperature, _) in self._requests.items():
                if temperature != 1:
                    logits[row] /= temperature
            logits[rows, draw_(logits, uniforms)[rows]] = torch.inf
        return logits


def draw_(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution of ``softmax(logits)`` passes ``uniforms`` in [0, 1); [B, V], [B] -> [B].

    It is looked up among blocks of the vocabulary first, then within one: no running sum goes over the whole vocabulary.
    ``logits`` become weights in place, proportional to the probabilities: another tensor of this size takes as long as the rest.
    """
    vocab_size = logits.shape[-1]
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    split = vocab_size - vocab_size % BLOCK
    sums = [weights[:, :split].unflatten(-1, (-1, BLOCK)).sum(-1), weights[:, split:].sum(-1, keepdim=True)]
    blocks = torch.cat(sums, -1).double()
    ends = blocks.cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True)
    places = block * BLOCK + torch.arange(BLOCK)
    within = weights.gather(-1, places.clamp(max=vocab_size - 1)).double().where(places < vocab_size, 0).cumsum(-1)
    fraction = (target - (ends - blocks).gather(-1, block)) / blocks.gather(-1, block)
    place = torch.searchsorted(within, fraction.clamp(0, 1 - 1e-12) * within[:, -1:], right=True)
    return (block * BLOCK + place)[:, 0]


def _uniform(seed: int, output: list[int]) -> float:
    return (derive_seed(seed, len(output)) >> 10) / 2**53


def _request(params: Any, prompt: Any, output: list[int]) -> tuple[int, float, list[int]] | None:
    return (*params.extra_args[CPU_SAMPLER], output) if params.extra_args else None
