"""Low-rank adaptation (Hu et al., arXiv 2106.09685): a layer's weight is W + (alpha / r) B A, of which A and B are learned.

    h = W x + (alpha / r) B (A x)        W [out, in], A [r, in], B [out, r]

B begins as zero, so that an untrained adapter changes nothing; A is uniform in +-1 / sqrt(in), as in the authors' code. By the
chain rule dL/dA = (alpha / r) B^T dL/dW and dL/dB = (alpha / r) dL/dW A^T. What leaves the learner is the sum, under the name
of W: rollouts and saved students know nothing of adapters.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raykd.experiment import LoRA


class Adapter(nn.Module):
    """The update of one layer; a child of it, so that ZeRO-3 gathers it where it is used."""

    def __init__(self, layer: nn.Module, config: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        weight: Tensor = layer.get_parameter("weight")
        self._transposed = isinstance(layer, Conv1D)  # GPT-2 keeps [in, out]
        outputs, inputs = reversed(weight.shape) if self._transposed else weight.shape
        first = torch.empty(config.rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        self.first = nn.Parameter(first.to(weight.dtype))
        self.second = nn.Parameter(weight.new_zeros(outputs, config.rank))
        self._scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        return self._scale * linear(linear(x, self.first), self.second)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with its update, rounded once."""
        update = self._scale * (self.second.float() @ self.first.float())
        return (weight.float() + (update.T if self._transposed else update)).to(weight.dtype)


def adapt(model: PreTrainedModel, config: LoRA) -> dict[str, Adapter]:
    """Freeze a model and adapt its layers; the adapters by the name of the weight that each updates."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    adapters = {}
    for name, layer in _targets(model, config.targets):
        layer.adapter = adapter = Adapter(layer, config, generator)
        layer.register_forward_hook(_add_update)
        adapters[f"{name}.weight"] = adapter
    return adapters


def check_targets(config: PreTrainedConfig, targets: tuple[str, ...]) -> None:
    """Raises ValueError where an architecture has no layers of these names; nothing is loaded."""
    with torch.device("meta"):
        _targets(AutoModelForCausalLM.from_config(config), targets)


def _add_update(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + layer.adapter(inputs[0])  # pyright: ignore[reportCallIssue]  modules are not typed by name


def _targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of those names, or all of them; the head is none of them: the loss multiplies by it without the layer."""
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head}
    kinds = {name.rpartition(".")[2] for name in layers}
    if unknown := set(wanted) - kinds:
        raise ValueError(
            f"learner.lora.targets: {model.config.model_type} has no linear layers named {', '.join(sorted(unknown))} that can "
            f"be adapted; it has {', '.join(sorted(kinds))}"
        )
    return ((name, layer) for name, layer in layers.items() if not wanted or name.rpartition(".")[2] in wanted)
