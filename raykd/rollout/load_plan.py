"""Where each published tensor goes in a model of vLLM: found by watching the model's own loader, then done again as plain copies.

vLLM reloads a model layer by layer: new memory, the loader's copies into it, repacking for the kernels, a copy into the old
memory. Which part goes where follows from names and shapes alone, and those are the same in every update. So the first update is
vLLM's own, watched; later ones make the same copies straight into the memory that the kernels use.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from raykd.rollout.packed_matrix import PackedMatrix

Place = tuple[nn.Module, str]
"""A layer, and the name of a parameter or buffer of it."""


class View(NamedTuple):
    """A part of a tensor's memory, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "View":
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def within(self, tensor: Tensor) -> Tensor:
        """This part of another tensor."""
        return tensor.as_strided(self.shape, self.stride, self.offset)


class Copy(NamedTuple):
    """A part of a published tensor, and where the loader put it."""

    name: str
    source: View
    target: View


class Recorder(TorchDispatchMode):
    """Sees what a model's loader copies into the layers, whose tensors wait for their values on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.published: dict[str, Tensor] = {}
        self.copies: dict[Place, dict[Copy, None]] = defaultdict(dict)  # ordered, each once
        self.unknown: set[Place] = set()
        """Places that were given something other than a published tensor."""
        self._names: dict[int, str] = {}
        self.waiting: dict[Place, Tensor] = {
            (layer, name): tensor
            for layer in model.modules()
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        }
        self._places = {_storage(tensor): place for place, tensor in self.waiting.items()}

    def watched(self, tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, on their way to the loader."""
        for name, tensor in tensors:
            self.published[name] = tensor
            self._names[_storage(tensor)] = name
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and (place := self._places.get(_storage(args[0]))):
            if name := self._names.get(_storage(args[1])):
                self.copies[place][Copy(name, View.of(args[1]), View.of(args[0]))] = None
            elif _storage(args[1]) != _storage(args[0]):
                self.unknown.add(place)
        return func(*args, **(kwargs or {}))


class LoadPlan:
    """The copies of an update, by published name."""

    def __init__(self, model: nn.Module, recorder: Recorder, head_dtype: torch.dtype) -> None:
        """After the watched update. Raises NotImplementedError where it takes more than copies and packed matrices."""
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "weights")
        self._shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in recorder.published.items()}
        self._writes: dict[str, list[tuple[View, Callable[[Tensor], Any]]]] = defaultdict(list)
        if any(is_deferred_attention_layer(layer) and type(layer) is not Attention for layer in model.modules()):
            raise NotImplementedError("attention that derives matrices from its weights")
        packed: list[tuple[Any, PackedMatrix]] = []
        heads = _heads(model, head_dtype)
        for (layer, name), copies in recorder.copies.items():
            _refuse_processing(layer, (layer, name) in recorder.unknown)
            parameter, loaded = getattr(layer, name), recorder.waiting[layer, name]
            if (parameter.shape, parameter.dtype) == (loaded.shape, loaded.dtype):
                weight, owners = parameter.data, [head for head in heads if head.weight is parameter]
                self._plan(copies, lambda target, weight=weight: target.within(weight).copy_)
            elif not parameter.numel():  # vLLM has freed it: on CPU a linear layer needs only its packed copy
                weight, owners = _assembled(copies, recorder.published, loaded), [layer]
            else:
                raise NotImplementedError(f"{type(layer).__name__} keeps its {name} in another form")
            for owner in owners:
                matrix = PackedMatrix(weight)
                self._plan(copies, partial(self._into, matrix))
                packed.append((owner, matrix))
        if unseen := [name for name in recorder.published if name not in self._writes]:
            raise NotImplementedError(f"the loader puts {unseen[0]} into a tensor that it makes itself, or nowhere")
        for layer, matrix in packed:
            layer.cpu_linear = lambda x, weight, bias, matrix=matrix: matrix.linear(x, bias)

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy one published tensor to where it belongs."""
        if self._shapes.get(name) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} arrived as {list(tensor.shape)} of {tensor.dtype}, unlike in the first update; start a new engine for it"
            )
        for source, write in self._writes.get(name, ()):
            write(source.within(tensor))

    def missing(self, names: set[str]) -> list[str]:
        """Published tensors of the plan that are not among ``names``: an update by those would leave them as they were."""
        return [name for name in self._writes if name not in names]

    def _plan(self, copies: dict[Copy, None], writer: Callable[[View], Callable[[Tensor], Any]]) -> None:
        for copy in copies:
            self._writes[copy.name].append((copy.source, writer(copy.target)))

    def _into(self, matrix: PackedMatrix, target: View) -> Callable[[Tensor], None]:
        """Writes rows of a packed matrix."""
        depth = target.shape[-1]
        if target.stride != (depth, 1) or target.offset % depth:
            raise NotImplementedError("a packed matrix is written in whole rows")
        return partial(matrix.write, first=target.offset // depth, pool=self._pool, num_threads=self._threads)


def _heads(model: nn.Module, head_dtype: torch.dtype) -> list[Any]:
    """The embeddings that logits are computed with from a packed copy; of another dtype the plain matrix is used."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)] or layers
    return [layer for layer in heads if hasattr(layer, "cpu_linear") and layer.weight.dtype == head_dtype]


def _refuse_processing(layer: nn.Module, computed: bool) -> None:
    """Only of these layers it is known here what vLLM makes of their tensors: nothing, or a packed matrix."""
    method = getattr(layer, "quant_method", None)
    known = type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    if computed or not (known or (method is None and not hasattr(layer, "process_weights_after_loading"))):
        raise NotImplementedError(f"{type(layer).__name__} computes with its weights when they are loaded")


def _assembled(copies: dict[Copy, None], published: dict[str, Tensor], like: Tensor) -> Tensor:
    """The matrix that the copies make up."""
    matrix = torch.zeros(like.shape, dtype=like.dtype)
    for copy in copies:
        copy.target.within(matrix).copy_(copy.source.within(published[copy.name]))
    return matrix


def _storage(tensor: Tensor) -> int:
    """What all views of a tensor share."""
    return tensor.untyped_storage()._cdata
