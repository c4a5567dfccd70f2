"""What counts of a model before there is one."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from raykd.experiment import LoRA
from raykd.lora import adapt

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What counts of a model."""

    parameters: int
    learned: int
    """Those that have gradients."""
    width: int
    layers: int
    computed: int
    """Numbers that each token is multiplied by, the head's left out."""
    stored: int | None = None
    """Bytes of a quantised checkpoint; 0 where they are not known."""

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: LoRA | None = None) -> "Size":
        """Of a causal model, with the adapters of ``lora``."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            if lora is not None and lora.rank:
                adapt(model, lora)
        active = getattr(config, "num_experts_per_tok", None) or 1  # of a layer's experts, which are one tensor [experts, ., .]
        looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        body = [p for p in model.base_model.parameters() if id(p) not in looked_up]
        computed = sum(p.numel() * (min(1, active / len(p)) if p.ndim == 3 else 1) for p in body)
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            learned=sum(p.numel() for p in model.parameters() if p.requires_grad),
            width=model.get_input_embeddings().get_parameter("weight").shape[1],
            layers=getattr(config, "num_hidden_layers", 1),
            computed=int(computed),
        )

    @property
    def kept(self) -> int:
        """Numbers that one layer keeps of one token for its backward pass, about: half as many again as its products read and put
        out, with fused norms and MLPs; architectures without them keep up to twice as many."""
        return int(1.5 * self.computed / (self.layers * self.width))

    def weight_bytes(self, dtype: str, parallel: int = 1) -> int:
        """Of its weights as a frozen model's, of which a GPU has one of ``parallel`` parts."""
        return (self.stored or BYTES[dtype] * self.parameters) // parallel
