"""The student of 16M and the teacher of 53M parameters that benchmarks write, score and learn with: random-weight Llamas.

Random weights change no cost but that of the length: such a model practically never writes EOS, so that all responses have the
longest length allowed, which favours whoever pads. With ``ending`` it ends at every token with about that probability. ``UNEVEN``
responses are as uneven as Dolly's reference answers cut so (GPT-2's tokens): their mean is 63 (Dolly 67), the
longest of 8 is 2.6 means long (2.6), of 32 3.6 (3.6).
"""

import math
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "student": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "teacher": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}
VOCABULARY, EOS = 50_257, 50_256
UNEVEN = (256, 1 / 64)
"""The longest response, and how likely one ends at a token."""
CONSTANT = 0.1
"""Of every embedding, in a coordinate of its own, several times the others' size: so the state has one that hardly varies."""


def random_llama(name: str, seed: int, sharpness: float, ending: float | None = None) -> LlamaForCausalLM:
    """``sharpness`` scales the logits: at 1 the distributions are nearly flat."""
    torch.manual_seed(seed)
    shape = SHAPES[name] | {"vocab_size": VOCABULARY, "tie_word_embeddings": True, "bos_token_id": EOS, "eos_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        model.model.norm.weight.mul_(sharpness)
        if ending is not None:
            _end(model, ending)
    return model


def _end(model: LlamaForCausalLM, probability: float) -> None:
    """Make EOS a multiple of the constant coordinate, so that its mean probability on random texts is as given."""
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = CONSTANT
    embedding[EOS] = 0.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    states = model.model(torch.randint(EOS, (8, 64))).last_hidden_state.flatten(0, 1)
    others = (states @ embedding[:EOS].T).logsumexp(-1)

    def mean(factor: float) -> float:
        return float((factor * states[:, 0] - others).sigmoid().mean())

    low, high = 0.0, 100.0 / float(states[:, 0].mean())
    for _ in range(50):
        factor = (low + high) / 2
        low, high = (factor, high) if mean(factor) < probability else (low, factor)
    embedding[EOS, 0] = factor
    assert math.isclose(mean(factor), probability, rel_tol=0.01)
