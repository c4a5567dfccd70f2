"""The teacher worker: one prefill over prompt and response, and what an algorithm needs of its distribution on the response."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raykd.algorithms.base import Needs
from raykd.experiment import TeacherConfig
from raykd.head import Head
from raykd.payloads import Probe, Top, chosen_payload, payload_bytes
from raykd.projection import teacher_probe, teacher_top
from raykd.records import Rollout, Scores
from raykd.teacher.states import PrefillStates, States

PROBE_EVERY = 16
"""Where no algorithm asks for the log-prob of every token, the probe looks at every so many tokens only: a look costs the product
with the whole head, which for a small model is half of scoring."""


class Teacher:
    """Frozen. ``score`` sends the hidden state after the final norm, times ``head`` the exact distribution; or, where they have
    fewer bytes, the logits (a vocabulary smaller than the model is wide) or all that a divergence looks at."""

    def __init__(
        self, model: str | PreTrainedModel, config: TeacherConfig, *, vocab_size: int, max_length: int | None = None
    ) -> None:
        """``model`` is a folder, a name on the Hub, or, for the back end "transformers", the model itself; ``max_length`` the
        longest prompt and response together, None whatever the model takes."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._states: States
        if config.backend == "vllm":
            from raykd.teacher.pooled import PooledStates

            assert isinstance(model, str), "vLLM reads a checkpoint"
            self._states = PooledStates(model, config, max_length)
        else:
            self._states = PrefillStates(model, config, self.device)
        head = self._states.head.to(self.device)
        self._head, self._ready_head = head.cut(vocab_size), head.ready(vocab_size)
        self.config, self.vocab_size = config, vocab_size

    def payload(self, top_k: int | None = None) -> str:
        """What is sent: ``hidden``, ``logits``, or ``top`` where a divergence looks at ``top_k`` tokens only."""
        sizes = payload_bytes(self._head.weight.shape[1], self.vocab_size, self._head.weight.dtype, top_k)
        return chosen_payload(self.config.payload, sizes)

    def head(self) -> Head:
        """The language-model head on the CPU, cut to the true vocabulary: the learner's copy."""
        return self._head.to(torch.device("cpu"))

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None = None) -> Scores:
        """Score the responses; the block's rows follow the order of ``rollouts``. ``top_k``: the algorithm's."""
        states = torch.cat(self._states.of(rollouts)).to(self.device)
        offsets = (0, *accumulate(len(rollout.tokens) for rollout in rollouts))
        if needs is Needs.DISTRIBUTION and top_k is not None and self.payload(top_k) == "top":
            return self._top(states, rollouts, offsets, top_k)
        probe = self._probe(states, rollouts, offsets, 1 if needs.sampled else PROBE_EVERY)
        sent: dict[str, Any] = {}
        if needs.distribution:
            payload = self.payload()
            sent[payload] = fetched(states if payload == "hidden" else self._ready_head(states))
        return Scores(offsets=offsets, log_normaliser=probe.log_normaliser, logprobs=probe.logprobs, **sent)

    def shared(
        self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None
    ) -> tuple[Scores | None, list[tuple[float, ...] | None]]:
        """``score`` for a learner and for the loop: the block where the distribution is needed, and of each response log p of its
        tokens where those are."""
        scores = self.score(rollouts, needs, top_k)
        logprobs = [tuple(values.tolist()) if needs.sampled else None for values in scores.logprobs_by_rollout()]
        return (scores if needs.distribution else None), logprobs

    def _top(self, states: Tensor, rollouts: Sequence[Rollout], offsets: tuple[int, ...], top_k: int) -> Scores:
        """The most probable tokens; the probe is their log-probs, where the response has one of them."""
        top = Top(*map(fetched, teacher_top(states, self._ready_head, top_k, self.vocab_size, self.config.chunk)))
        tokens = torch.tensor([token for rollout in rollouts for token in rollout.tokens], dtype=torch.int32)
        written = top.tokens == tokens[:, None]
        logprobs = torch.where(written, top.logprobs[:, :-1], 0.0).sum(-1)
        unseen = ~written.any(-1)
        return Scores(
            offsets=offsets,
            log_normaliser=torch.zeros_like(logprobs).masked_fill_(unseen, torch.nan),
            logprobs=logprobs.masked_fill_(unseen, torch.nan),
            top=top,
        )

    def _probe(self, states: Tensor, rollouts: Sequence[Rollout], offsets: Sequence[int], every: int) -> Probe:
        """The probe at every ``every``-th token of a response from the first predicted one on, NaN between them; on the CPU."""
        firsts = [0 if every == 1 else rollout.first_predicted for rollout in rollouts]
        spans = zip(offsets, offsets[1:], firsts, strict=False)
        at = torch.tensor([row for start, end, first in spans for row in range(start + first, end, every)], dtype=torch.long)
        tokens = torch.tensor([token for rollout in rollouts for token in rollout.tokens], dtype=torch.long)
        seen, chosen = states if every == 1 else states[at.to(self.device)], tokens[at].to(self.device)
        probe = Probe(*torch.full((2, len(tokens)), torch.nan).unbind())
        found = teacher_probe(seen, self._ready_head, chosen, vocab_size=self.vocab_size, chunk=self.config.chunk)
        for values, known in zip(probe, found, strict=True):
            values[at] = known.cpu()
        return probe

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The teacher's own answers to some prompts, sampled at temperature 1: a few, to be looked at."""
        return self._states.answer(prompts, max_tokens, eos_ids, self.vocab_size)


def fetched(values: Tensor) -> Tensor:
    """On the CPU; from a GPU by page-locked memory, several times as fast as to any other."""
    found = values.to("cpu", non_blocking=True)
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()
    return found
