"""Sampling on CPU from the plain softmax, with log-probs: one exponential an entry of the vocabulary, one random number a token.

vLLM's own sampler draws a number for every entry of the vocabulary, and goes through it once more for each of the log-softmax,
the argmax and the token's rank: for a small model a third of its time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from raykd.rollout.requests import derive_seed
from raykd.rollout.sessions import SCORED, Scores
from raykd.rollout.vllm_engine import CPU_SAMPLER

BLOCK = 256
"""Tokens looked up together."""


class SoftmaxSampler(Sampler):
    """Draws a token by the seed of its request and its place in the request's output; log-probs are those at temperature 1.

    Tokens of the text that a request wants scored have their logits behind those of the tokens to draw.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.scores: Scores = {}
        self._to_score: list[_Place] = []
        self._runner = model_runner
        self._prepare_inputs = model_runner._prepare_inputs
        model_runner._prepare_inputs = self._add_scored_rows

    def _add_scored_rows(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """vLLM's inputs of a step, and with the rows of its hidden states whose logits are wanted those that score."""
        rows, *others = self._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self._runner.input_batch
        self._to_score = []
        start = 0
        for index, (name, length) in enumerate(zip(batch.req_ids, num_scheduled_tokens.tolist(), strict=True)):
            first, end = self._runner.requests[name].sampling_params.extra_args[SCORED]
            if first < end:
                read = int(batch.num_computed_tokens_cpu[index])
                for position in range(max(first, read + 1), min(end, read + length + 1)):
                    token = int(batch.token_ids_cpu[index, position])
                    self._to_score.append(_Place(name, position, token, row=start + position - 1 - read))
            start += length
        if self._to_score:
            rows = torch.cat([rows, torch.tensor([place.row for place in self._to_score], dtype=rows.dtype)])
        return rows, *others

    def forward(self, logits: Tensor, sampling_metadata: Any, *_: Any, **__: Any) -> SamplerOutput:
        """One token a request, its log-prob, and those of the tokens asked for; ``logits`` ``[B, V]`` are used up."""
        requests = [self._runner.requests[name] for name in self._runner.input_batch.req_ids]
        wishes = [request.sampling_params.extra_args[CPU_SAMPLER] for request in requests]
        uniforms = [_uniform(seed, request.output_token_ids) for (seed, _), request in zip(wishes, requests, strict=True)]
        uniforms += [0.0] * len(self._to_score)  # drawn, too, and not looked at
        to_score = {len(requests) + index: [place.token] for index, place in enumerate(self._to_score)}
        asked = _padded((sampling_metadata.logprob_token_ids or {}) | to_score, len(logits))
        logprobs = logits.gather(-1, asked.clamp(min=0))
        greedy = {row: logits[row].argmax() for row, (_, temperature) in enumerate(wishes) if temperature == 0}
        scaled = {row: logits[row].logsumexp(-1) for row, (_, temperature) in enumerate(wishes) if temperature not in (0, 1)}
        for row in scaled:
            logits[row] /= wishes[row][1]
        largest, weights = exponentiate_(logits)
        tokens, sums = draw(weights, torch.tensor(uniforms, dtype=torch.float64))
        for row, token in greedy.items():
            tokens[row] = token
        normaliser = largest + sums.log()
        chosen = largest + weights.gather(-1, tokens[:, None]).log()
        for row, at_one in scaled.items():
            normaliser[row] = at_one
            chosen[row] *= wishes[row][1]
        logprobs = torch.cat([chosen, logprobs.masked_fill(asked < 0, -torch.inf)], -1) - normaliser
        for place, logprob in zip(self._to_score, logprobs[len(requests) :, 1:].tolist(), strict=True):
            self.scores.setdefault(place.request, {})[place.position] = logprob[0]
        tokens, asked, logprobs = tokens[: len(requests), None], asked[: len(requests)], logprobs[: len(requests)]
        ids = torch.cat([tokens, asked], -1).int()
        unranked = torch.zeros(len(tokens), dtype=torch.int32)
        return SamplerOutput(tokens.int(), LogprobsTensors(ids, logprobs, unranked))


class _Place(NamedTuple):
    """A token of a text that is scored in this step."""

    request: str
    position: int
    token: int
    row: int
    """Row of the step's hidden states at which the token before it was read."""


def exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row, and in place of the logits weights proportional to the probabilities; [B, 1], [B, V].

    Another tensor of this size takes as long as the rest.
    """
    largest = logits.amax(-1, keepdim=True)
    return largest, logits.sub_(largest).exp_()


def draw(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of ``weights`` passes a share ``uniforms`` in [0, 1); [B, V], [B] -> [B], sums [B, 1].

    It is looked up among blocks of the vocabulary first, then within one: no running sum goes over the whole vocabulary.
    """
    vocab_size = weights.shape[-1]
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
    return (block * BLOCK + place)[:, 0], ends[:, -1:].float()


def _uniform(seed: int, output: list[int]) -> float:
    return (derive_seed(seed, len(output)) >> 10) / 2**53


def _padded(lists: dict[int, list[int]], num_rows: int) -> Tensor:
    """Lists of tokens by row, -1 where a row has fewer than the longest; [B, K]."""
    width = max(map(len, lists.values()), default=0)
    rows = (lists.get(row, []) for row in range(num_rows))
    return torch.tensor([[*tokens, *[-1] * (width - len(tokens))] for tokens in rows], dtype=torch.int64).view(num_rows, width)
