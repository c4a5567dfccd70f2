"""On a GPU: norms, gated MLPs and rotary embeddings of a Hugging Face model as one kernel each, those of Liger-Kernel
(arXiv 2410.10989).

A plain model spends two fifths of a scoring pass on their many small steps. Takes part where liger-kernel is installed and knows
the architecture; what is computed stays the same.
"""

import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest accepted relative error (of norms) of the states. Rounding alone makes 0.1 in bfloat16 after forty layers, a wrong
function more than 1."""
ROTARY = "apply_rotary_pos_emb"


@torch.no_grad()
def fuse(model: PreTrainedModel) -> bool:
    """Give this model fused kernels, others of its class none. False where there are none for it; RuntimeError where they
    compute something else."""
    if model.device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        return False
    ids = torch.arange(32, device=model.device)[None] % model.config.vocab_size
    plain = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    losses = {name: False for name in inspect.signature(apply).parameters if name.endswith("cross_entropy")}
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    apply(model=model, **losses)
    rotary = vars(module).get(ROTARY)
    vars(module).update(before)  # it replaces the classes of other models, too
    if rotary is not before.get(ROTARY):
        setattr(module, ROTARY, _on_gpus(rotary, before[ROTARY]))
    fused = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    error = float((fused - plain).norm() / plain.norm())
    if not error <= TOLERANCE[plain.dtype]:
        raise RuntimeError(
            f"liger-kernel's {model.config.model_type} gives other states than transformers' (off by {error:.0%}): install "
            "versions of both that belong together, or uninstall liger-kernel"
        )
    return True


def _on_gpus(there: Any, here: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A module's function that is ``there`` for tensors on a GPU and ``here`` for others."""

    def rotary(query: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        return (there if query.is_cuda else here)(query, *args, **settings)

    return rotary
