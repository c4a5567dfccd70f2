"""The teacher's output head: of a model at hand, or read from its checkpoint alone."""

from copy import deepcopy
from dataclasses import replace

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from raykd.head import Head
from raykd.pretrained import find_body
from raykd.student import logit_scale_and_softcap, verify_head

SMALL = {"num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
LARGE = 100.0
WEIGHTS = "model.safetensors"
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
REMEDY = "use a checkpoint whose head is not quantised"


def head_of(model: PreTrainedModel) -> Head:
    """The head of a Hugging Face causal language model, with the scale and soft-cap of its architecture."""
    output = model.get_output_embeddings()
    if output is None:
        raise ValueError(f"teacher architecture {model.config.model_type} has no linear head; it cannot send hidden states")
    scale, softcap = logit_scale_and_softcap(model.config)
    bias = None if getattr(output, "bias", None) is None else output.bias.detach()
    return Head(weight=output.weight.detach(), bias=bias, scale=scale, softcap=softcap)


def head_in_checkpoint(model: str, dtype: torch.dtype) -> Head:
    """The head of a checkpoint, without loading the body; ValueError where the checkpoint stores it in no plain dtype.

    Quantised checkpoints leave the head as it was unless they say otherwise: the distribution is that head's, of the quantised
    body's states, as everybody computes it who serves such a checkpoint.
    """
    config = AutoConfig.from_pretrained(model)
    _verify_architecture(config, model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    head, output = head_of(empty), empty.get_output_embeddings()
    weight, bias = (_stored(model, empty, getattr(output, part, None), dtype) for part in ("weight", "bias"))
    if weight is None or weight.shape != head.weight.shape:
        raise ValueError(f"teacher {model}: its configuration and its checkpoint disagree about the shape of its head")
    return replace(head, weight=weight, bias=bias)


def _verify_architecture(config: PreTrainedConfig, model: str) -> None:
    """As ``verify_head``, of one random layer and a few tokens: the body is vLLM's. Logits are so large that any cap shows."""
    small = deepcopy(config)
    for name, value in SMALL.items():
        if hasattr(small, name):
            setattr(small, name, value)
    if kinds := vars(small).get("layer_types"):
        small.layer_types = kinds[:1]
    random = find_body(AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval())
    head = head_of(random)
    head.weight.mul_(LARGE)
    verify_head(random, head, f"teacher {model}")


def _stored(model: str, empty: PreTrainedModel, parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A parameter's value, under any of its names: a tied head has the embedding's, and old checkpoints may call it otherwise."""
    if parameter is None:
        return None
    names = [name for name, own in empty.named_parameters(remove_duplicate=False) if own is parameter]
    renamings = [rule for rule in get_model_conversion_mapping(empty) if isinstance(rule, WeightRenaming)]
    parameters = empty.state_dict()
    for path in _files(model):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no dictionary)
                name, _ = rename_source_key(key, renamings, [], empty.base_model_prefix, parameters)
                if name in names:
                    tensor = file.get_tensor(key)
                    if tensor.dtype not in PLAIN:
                        raise ValueError(f"teacher {model}: its head is quantised ({key} is {tensor.dtype}); {REMEDY}")
                    return tensor.to(dtype)
    raise ValueError(f"teacher {model}: no tensor of its checkpoint is its head ({' or '.join(names)}); {REMEDY}")


def _files(model: str) -> list[str]:
    """The checkpoint's files, on this machine."""
    if index := cached_file(model, f"{WEIGHTS}.index.json", _raise_exceptions_for_missing_entries=False):
        return get_checkpoint_shard_files(model, index)[0] or []
    if whole := cached_file(model, WEIGHTS, _raise_exceptions_for_missing_entries=False):
        return [whole]
    raise ValueError(f"teacher {model} has no {WEIGHTS}; save it as safetensors, or set teachers.backend to transformers")
