"""The teacher worker: one prefill over prompt and response, and what an algorithm needs of its distribution on the response."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from raykd.algorithms.base import Needs
from raykd.experiment import TeacherConfig
from raykd.packing import can_pack, packed, padded
from raykd.payloads import Probe, Top, payload_bytes
from raykd.projection import Head, teacher_probe, teacher_top
from raykd.records import Rollout, Scores
from raykd.student import logit_scale_and_softcap

PROBE_EVERY = 16
"""Where no algorithm asks for the log-prob of every token, so many tokens apart is the teacher's distribution compared with what
the learner rebuilds: looking costs the product with the whole head, which for a small model is half of scoring."""


class Teacher:
    """Frozen. ``score`` sends the hidden state after the final norm, times ``head`` the exact distribution; or, where they have
    fewer bytes, the logits (a vocabulary smaller than the model is wide) or all that a divergence looks at."""

    def __init__(self, model: str | PreTrainedModel, config: TeacherConfig, *, vocab_size: int) -> None:
        """``model`` is a folder, a name on the Hub, or the model itself."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = isinstance(model, PreTrainedModel)
        causal = model if loaded else AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.dtype))
        causal.to(self.device)  # pyright: ignore[reportArgumentType]  transformers wraps it without its signature
        causal = causal.eval().requires_grad_(False)
        self._causal: Any = causal  # its ``generate`` has no usable annotations
        self._lay = packed if can_pack(causal) else padded
        self._body = causal.base_model
        self._head = head_of(causal).cut(vocab_size)
        self.config, self.vocab_size = config, vocab_size

    def payload(self, top_k: int | None = None) -> str:
        """What is sent: ``hidden``, ``logits``, or ``top`` where a divergence looks at ``top_k`` tokens only."""
        sizes = payload_bytes(self._head.weight.shape[1], self.vocab_size, self._head.weight.dtype, top_k)
        return self.config.payload if self.config.payload != "auto" else min(sizes, key=lambda payload: sizes[payload])

    def head(self) -> Head:
        """The language-model head on the CPU, cut to the true vocabulary: the learner's copy."""
        bias = None if self._head.bias is None else self._head.bias.cpu()
        return Head(weight=self._head.weight.cpu(), bias=bias, scale=self._head.scale, softcap=self._head.softcap)

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None = None) -> Scores:
        """Score the responses; the block's rows follow the order of ``rollouts``. ``top_k``: the algorithm's."""
        hidden: list[Tensor] = [torch.empty(0)] * len(rollouts)
        for batch in _batches(rollouts, self.config.batch_tokens, packs=self._lay is packed):
            for index, rows in zip(batch, self._response_states([rollouts[i] for i in batch]), strict=True):
                hidden[index] = rows
        states = torch.cat(hidden)
        offsets = (0, *accumulate(len(rollout.tokens) for rollout in rollouts))
        if needs is Needs.DISTRIBUTION and top_k is not None and self.payload(top_k) == "top":
            return self._top(states, rollouts, offsets, top_k)
        probe = self._probe(states, rollouts, offsets, 1 if needs.sampled else PROBE_EVERY)
        sent: dict[str, Any] = {}
        if needs.distribution:
            payload = self.payload()
            sent[payload] = (states if payload == "hidden" else self._head(states)).cpu()
        return Scores(offsets=offsets, log_normaliser=probe.log_normaliser, logprobs=probe.logprobs, **sent)

    def _top(self, states: Tensor, rollouts: Sequence[Rollout], offsets: tuple[int, ...], top_k: int) -> Scores:
        """The most probable tokens; the probe is their log-probs, where the response has one of them."""
        top = Top(*(values.cpu() for values in teacher_top(states, self._head, top_k, self.vocab_size, self.config.chunk)))
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
        """Of every so many tokens of a response from the first predicted one on, NaN between them; on the CPU."""
        firsts = [0 if rollout.prompt_tokens or every == 1 else 1 for rollout in rollouts]
        spans = zip(offsets, offsets[1:], firsts, strict=False)
        at = torch.tensor([row for start, end, first in spans for row in range(start + first, end, every)], dtype=torch.long)
        tokens = torch.tensor([token for rollout in rollouts for token in rollout.tokens], dtype=torch.long)
        seen, chosen = states if every == 1 else states[at.to(self.device)], tokens[at].to(self.device)
        probe = Probe(*torch.full((2, len(tokens)), torch.nan).unbind())
        found = teacher_probe(seen, self._head, chosen, vocab_size=self.vocab_size, chunk=self.config.chunk)
        for values, known in zip(probe, found, strict=True):
            values[at] = known.cpu()
        return probe

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The teacher's own answers to some prompts, sampled at temperature 1: a few, to be looked at."""
        rows = self._causal.get_input_embeddings().weight.shape[0]
        rules = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=max_tokens,
            eos_token_id=list(eos_ids),
            pad_token_id=eos_ids[0],
            suppress_tokens=list(range(self.vocab_size, rows)) or None,
        )
        torch.manual_seed(0)
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.device)
            written = self._causal.generate(ids, attention_mask=torch.ones_like(ids), generation_config=rules)
            answers.append(tuple(written[0, len(prompt) :].tolist()))
        return answers

    def _response_states(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """For each rollout the states [T, H] of the positions that predict its response."""
        layout = self._lay([rollout.prompt_tokens for rollout in rollouts], [rollout.tokens for rollout in rollouts], 0)
        states = layout.to(self.device).states(self._body)
        return [states[positions] for positions in layout.predictors]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a Hugging Face causal language model, with the scale and soft-cap of its architecture."""
    config = model.config
    output = model.get_output_embeddings()
    if output is None or getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise ValueError(f"teacher architecture {config.model_type} has no plain linear head; it cannot send hidden states yet")
    scale, softcap = logit_scale_and_softcap(config)
    bias = None if getattr(output, "bias", None) is None else output.bias.detach()
    return Head(weight=output.weight.detach(), bias=bias, scale=scale, softcap=softcap)


def _batches(rollouts: Sequence[Rollout], batch_tokens: int, *, packs: bool) -> list[list[int]]:
    """Indices in batches of at most ``batch_tokens`` positions, or one rollout: packed, those of one prompt together; padded,
    those of similar length."""
    lengths = [len(rollout.prompt_tokens) + len(rollout.tokens) for rollout in rollouts]
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
