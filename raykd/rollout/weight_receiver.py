"""The receiving end of a weight update: buckets of named tensors, through vLLM's weight-transfer interface.

    start_weight_update      vLLM keeps the old tensors' storage and waits for new values, layer by layer
    update_weights(bucket)   as soon as a layer has all its values: load, repack for the kernels, copy in place
    finish_weight_update     refused unless every layer was filled

On CPU that is the first update only: it is watched, and later ones make its copies alone, in place (load_plan.py).

Imported by every vLLM worker (``WorkerExtension`` is its worker extension), in the engine's process or in a tree of processes.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from raykd.gpu_sharing import gpu_uuid
from raykd.rollout.cpu_head import WideHead, widen_head
from raykd.rollout.load_plan import LoadPlan, Recorder
from raykd.rollout.sessions import Scores
from raykd.weights import Bucket, unpack

if current_platform.is_cpu():
    import raykd.engine.small_heads  # noqa: F401  (registers the attention back end)

BACKEND = "raykd-buckets"

# Its warnings of layers without new values count tied heads and constant buffers; we check exactly that ourselves.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Set once, before the first request."""

    vocab_size: int | None = None
    """True vocabulary of a model whose matrices are padded past it."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket of a published version."""

    bucket: Bucket


class BucketReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads buckets into the model in place; the storage that kernels and captured graphs point to stays the same."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    plan: LoadPlan | None = None
    """How to update in place, once it is known."""
    _recorder: Recorder | None = None
    _head: WideHead | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Cut the padding off the vocabulary."""
        if init_info.vocab_size is not None:
            cut_vocabulary(self.model, init_info.vocab_size)
        if current_platform.is_cpu():
            self._head = widen_head(self.model, self.model_config.dtype)

    def start_weight_update(self) -> None:
        """Make every layer wait for its values."""
        self._loaded: set[str] = set()
        if self.plan is None:
            if current_platform.is_cpu():
                forget_expert_kernels(self.model)
            initialize_layerwise_reload(self.model)
            self._recorder = Recorder(self.model) if current_platform.is_cpu() else None

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one bucket; the model's own loader knows which names are stacked, split or tied."""
        tensors = [(name, tensor.to(self.device)) for name, tensor in unpack(update_info.bucket)]
        self._loaded.update(name for name, _ in tensors)
        load_weights: Any = self.model.load_weights
        if self.plan is not None:
            for name, tensor in tensors:
                self.plan.load(name, tensor)
        elif self._recorder is not None:
            with self._recorder:
                load_weights(self._recorder.watched(tensors))
        else:
            load_weights(tensors)

    def finish_weight_update(self) -> None:
        """Put every layer back to work, once all have their values."""
        if self._head is not None:
            self._head.forget()
        if self.plan is not None:
            _refuse_missing(self.plan.missing(self._loaded))
            return
        unfilled = unfilled_layers(self.model)
        _refuse_missing([name for name, is_tied in unfilled.items() if not is_tied])
        finalize_layerwise_reload(self.model, self.model_config)
        for name in unfilled:  # on CPU a tied head multiplies by a repacked copy of the embedding, which is stale now
            head = self.model.get_submodule(name)
            if isinstance(head, ParallelLMHead):
                head.quant_method.process_weights_after_loading(head)
        if not current_platform.is_cpu():
            torch.accelerator.synchronize(self.device)  # after this, the buckets may be written over
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            with suppress(NotImplementedError):  # this model is always reloaded
                self.plan = LoadPlan(self.model, recorder, self.model_config.head_dtype)

    def shutdown(self) -> None:
        """Nothing to release: buckets are owned by whoever fetched them."""


class WorkerExtension:
    """Named in the engine's arguments so that every worker process imports this module."""

    model_runner: Any
    device: torch.device

    def own_gpu(self) -> str | None:
        """UUID of this worker's GPU, None on CPU."""
        return gpu_uuid(self.device)

    def sample_by_seed(self) -> Scores:
        """Put our sampler in the place of vLLM's; where it puts its scores."""
        from raykd.rollout.cpu_sampler import SoftmaxSampler

        self.model_runner.sampler = sampler = SoftmaxSampler(self.model_runner)
        return sampler.scores


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"weight update misses values of {len(names)} layers or tensors ({', '.join(names[:3])}): "
            "publish every parameter under its Hugging Face name; if all were, vLLM cannot reload this architecture as it runs"
        )


def unfilled_layers(model: nn.Module) -> dict[str, bool]:
    """The layers that got no values, or not all, and whether they need none: their parameters are those of a filled layer.

    The padding rows of an embedding never arrive; a layer without parameters is unfilled and needs none.
    """
    waiting: dict[str, list[Tensor]] = {}
    filled: set[int] = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        parameters = list(info.kernel_tensors[0].values() if info.kernel_tensors else layer.parameters(recurse=False))
        padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0
        is_filled = padded or is_deferred_attention_layer(layer) or info.load_numel >= (info.load_numel_total or 0)
        if info.can_load() and not is_filled:
            waiting[name] = parameters
        else:
            filled.update(map(id, parameters))
    return {name: filled.issuperset(map(id, parameters)) for name, parameters in waiting.items()}


def forget_expert_kernels(model: nn.Module) -> None:
    """Have the kernels of experts made anew at the end of an update: on CPU vLLM lays out the experts' matrices when it makes a
    kernel, and would leave a later update's as they were loaded."""
    methods: list[Any] = [getattr(layer, "quant_method", None) for layer in model.modules()]
    for method in methods:
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def cut_vocabulary(model: Any, vocab_size: int) -> None:
    """Make the model's logits end at the true vocabulary: sampling and log-probs then know no padding."""
    logits_processor = getattr(model, "logits_processor", None)
    if logits_processor is None:
        raise ValueError(f"the padded vocabulary of {type(model).__name__} cannot be cut; save it with unpadded matrices")
    if vocab_size > logits_processor.org_vocab_size:
        rows = logits_processor.org_vocab_size
        raise ValueError(f"vocab_size {vocab_size} is more than the {rows} rows of the model; give the tokenizer's size")
    logits_processor.org_vocab_size = vocab_size


WeightTransferEngineFactory.register_engine(BACKEND, BucketReceiver)
