"""The student as the learner trains it: one module whose forward goes from token ids to the loss, never holding ``[N, V]``.

    tokens, laid out -> body -> hidden states -> those that predict response tokens [N, H]
                     -> head and teacher, a chunk at a time -> the loss, and the sum of every metric

Everything differentiable happens inside this forward, so that ZeRO-3 gathers the weights, the head's too, where they are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from raykd.algorithms.base import Algorithm
from raykd.collate import MicroBatch
from raykd.experiment import LoRA
from raykd.head import Head
from raykd.lora import adapt
from raykd.mismatch import recorded_logprobs, with_mismatch
from raykd.packing import can_pack, packed, padded
from raykd.payloads import Probe
from raykd.pretrained import load_config, load_model
from raykd.projection import weighted_loss

HEAD_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest accepted difference of the rebuilt logits, relative to the largest logit."""


class StudentHead(nn.Module):
    """The output head and the loss on top of it.

    It owns the weight of the language-model head a second time: ZeRO-3 then gathers it once for all chunks, and ranks with
    different numbers of chunks still make the same collective calls. So it does with the frozen teacher's, where that is
    ``sharded``: each rank then holds its part of it between the steps.
    """

    def __init__(self, output: nn.Linear, scale: float, softcap: float | None, teacher: Head | None, *, sharded: bool) -> None:
        super().__init__()
        self.weight, self.bias = output.weight, output.bias
        self.scale, self.softcap = scale, softcap
        self._teacher, self.teacher_weight = teacher, None
        if teacher is not None and sharded:
            self.teacher_weight = nn.Parameter(teacher.weight.clone(), requires_grad=False)
            self._teacher = replace(teacher, weight=torch.empty(0))

    def head(self) -> Head:
        """The student's output head; valid while the weight is gathered."""
        return Head(weight=self.weight, bias=self.bias, scale=self.scale, softcap=self.softcap)

    def teacher_head(self) -> Head | None:
        """The teacher's, if there is one; valid while the weight is gathered."""
        if self._teacher is None or self.teacher_weight is None:
            return self._teacher
        return replace(self._teacher, weight=self.teacher_weight)

    def forward(
        self,
        hidden: Tensor,
        weights: Tensor,
        *,
        micro: MicroBatch,
        algorithm: Algorithm,
        given: dict[str, Tensor],
        vocab_size: int,
        chunk: int | None,
        compiled: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``[N, H], [N]`` to the weighted loss and the sum of every metric; ValueError when the teacher's own log-probs cannot be
        rebuilt from its scores."""
        return weighted_loss(
            self.head(),
            hidden,
            micro.tokens,
            weights,
            with_mismatch(algorithm.per_token) if bool(micro.batch.by_student.any()) else algorithm.per_token,
            vocab_size=vocab_size,
            given=given,
            teacher_states=micro.teacher,
            teacher_head=self.teacher_head() if micro.needs_head else None,
            probe=Probe(micro.log_normaliser, micro.logprobs),
            chunk=chunk,
            compiled=compiled,
        )


class Student(nn.Module):
    """A Hugging Face causal language model and the loss on top of it.

    It is in evaluation mode, and nothing is drawn at random (dropout, the experts of Phi-3.5-MoE, a router's jitter): the
    divergence is between the two models' distributions, and the sampled log-probs come from an engine that does nothing of it.
    The saved configuration keeps the original rates.
    """

    def __init__(
        self,
        folder: str,
        *,
        dtype: torch.dtype,
        vocab_size: int,
        chunk: int | None,
        teacher_head: Head | None,
        activation_checkpointing: bool,
        sharded: bool = False,
        compiled: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        """``sharded``: ZeRO-3 will spread the parameters over the ranks, the teacher's head among them."""
        super().__init__()
        config = load_config("student", folder)
        self._rates = dropout_rates(config)
        for name in self._rates:
            setattr(config, name, 0.0)
        self.model = load_model(folder, config=config, dtype=dtype)
        _mend_generation_config(self.model)
        # DeepSpeed casts every parameter to the student's dtype: a teacher of another one is kept whole.
        sharded = sharded and teacher_head is not None and teacher_head.weight.dtype == dtype
        if teacher_head is not None and not sharded:
            teacher_head = teacher_head.ready(vocab_size).frozen()
        output = _linear_head(self.model, folder, vocab_size)
        self.output = StudentHead(output, *logit_scale_and_softcap(config), teacher_head, sharded=sharded)
        self._vocab_size, self._chunk, self._compiled = vocab_size, chunk, compiled
        verify_head(self.model, self.output.head(), folder)
        self.lay = packed if can_pack(self.model) else padded
        self._state = self.model.state_dict(keep_vars=True)
        self._adapters = adapt(self.model, lora) if lora is not None and lora.rank else {}
        self.eval()
        if activation_checkpointing:
            compute_layers_again(self.model)

    def forward(self, micro: MicroBatch, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the loss and of every metric."""
        hidden = micro.layout.states(self.model.base_model)
        tokens_N = (micro.sequences, micro.slots)
        per_sequence = algorithm.per_sequence(micro.batch)
        loss, sums = self.output(
            hidden[micro.positions],
            algorithm.token_weights(micro.batch)[tokens_N],
            micro=micro,
            algorithm=algorithm,
            given={name: values_BT[tokens_N] for name, values_BT in (per_sequence | recorded_logprobs(micro.batch)).items()},
            vocab_size=self._vocab_size,
            chunk=self._chunk,
            compiled=self._compiled,
        )
        return loss, {name: value / max(1, micro.batch.totals.tokens) for name, value in sums.items()}

    def state(self) -> dict[str, Tensor]:
        """The model's parameters and buffers under their Hugging Face names, without adapters."""
        return self._state

    def parts(self, name: str) -> list[Tensor]:
        """The tensors that make up one entry of ``state``: itself and, where the layer is adapted, its adapter's two."""
        return [self._state[name], *(self._adapters[name].parameters() if name in self._adapters else ())]

    def whole(self, name: str) -> Tensor:
        """One entry of ``state`` as it leaves the learner, merged with its adapter; valid while its parts are gathered."""
        tensor = self._state[name].detach()
        return self._adapters[name].merged(tensor) if name in self._adapters else tensor

    def as_in_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries of ``state`` under the names and in the parts of the model's checkpoint, as engines read them: transformers
        keeps all experts of a layer as one tensor and calls some layers otherwise. Parts are views where they can be."""
        return revert_weight_conversion(self.model, tensors) if getattr(self.model, "_weight_conversions", None) else tensors

    @contextmanager
    def saved_config(self) -> Iterator[None]:
        """The configuration with the dropout rates of the original model."""
        for name, rate in self._rates.items():
            setattr(self.model.config, name, rate)
        yield
        for name in self._rates:
            setattr(self.model.config, name, 0.0)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Some checkpoints have settings of sampling and no ``do_sample``, which transformers reads and refuses to write. ValueError
    where more is wrong."""
    generation = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        generation.validate(strict=True)


def compute_layers_again(model: PreTrainedModel) -> None:
    """Have each layer computed once more in the backward pass; transformers does that for layers in training mode, and with all
    that is random in it: their parts stay in evaluation mode, and rates of dropout are to be 0."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def dropout_rates(config: PreTrainedConfig) -> dict[str, Any]:
    """Every non-zero dropout rate of a configuration: ``attention_dropout``, ``resid_pdrop``, ``layerdrop``, ..."""
    return {name: rate for name, rate in vars(config).items() if "drop" in name and isinstance(rate, float) and rate > 0}


def logit_scale_and_softcap(config: PreTrainedConfig) -> tuple[float, float | None]:
    """What an architecture does to the product of head and hidden state: Cohere, Granite and Falcon-H1 scale it, Gemma 2 and
    RecurrentGemma cap it."""

    def number(name: str) -> float:
        return float(getattr(config, name, None) or 0.0)

    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0) / (number("logits_scaling") or 1.0)
    return scale, number("final_logit_softcapping") or number("logits_soft_cap") or None


@torch.no_grad()
def verify_head(model: PreTrainedModel, head: Head, name: str) -> None:
    """Raise ValueError for an architecture whose logits are more than body, linear head, scale and soft-cap."""
    ids = torch.arange(4, device=model.device)[None] % len(head.weight)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    rebuilt = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    error = float((rebuilt - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= HEAD_TOLERANCE[head.weight.dtype]:
        raise ValueError(
            f"{name}: the logits of {model.config.model_type} are not its linear head times the last hidden state, "
            f"scaled and capped as its configuration says (relative error {error:.2g}); "
            "teach raykd.student.logit_scale_and_softcap what this architecture does"
        )


def _linear_head(model: PreTrainedModel, folder: str, vocab_size: int) -> nn.Linear:
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ValueError(f"{folder}: the head of {model.config.model_type} is {type(output).__name__}, not a linear layer")
    if output.weight.shape[0] < vocab_size:
        raise ValueError(
            f"{folder}: {output.weight.shape[0]} tokens in the model, {vocab_size} in the tokenizer; they do not belong together"
        )
    return output
