"""The language model of a checkpoint that takes images or sound, too, as a checkpoint for text alone."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, PreTrainedModel

from raykd.pretrained import load, load_model, locate


def save_language_model(name: str, output: Path) -> None:
    """Write the language model of ``name``, with its tokenizer and generation settings, to the folder ``output``.

    Raises ValueError where it is one for text already, where transformers has no class for it alone, and where that class does
    not compute the same logits.
    """
    config = load("model", name, AutoConfig)
    text = config.get_text_config()
    if text is config:
        raise ValueError(f"model {name} ({config.model_type}) takes text alone already; name it as it is")
    try:
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(text))
    except ValueError as error:
        raise ValueError(
            f"model {name}: transformers has no class for the language model of {config.model_type} alone"
        ) from error
    whole = load_model(locate("model", name), AutoModelForMultimodalLM).eval()
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    assert head is not None, "it is a language model"
    text.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight  # its own configuration may not know
    weights = {f"{kind.base_model_prefix}.{part}": tensor for part, tensor in decoder.state_dict().items()}
    weights["lm_head.weight"] = head.weight
    alone = kind.from_pretrained(None, config=text, state_dict=weights, dtype=whole.dtype).eval()
    _compare(whole, alone, name)
    alone.generation_config = whole.generation_config
    alone.save_pretrained(output)
    load("model", name, AutoTokenizer).save_pretrained(output)


@torch.no_grad()
def _compare(whole: PreTrainedModel, alone: PreTrainedModel, name: str) -> None:
    """Raise ValueError unless both give a few tokens the same logits, bit for bit."""
    ids = torch.arange(4)[None]
    if not torch.equal(whole(input_ids=ids, use_cache=False).logits, alone(input_ids=ids, use_cache=False).logits):
        raise ValueError(f"model {name}: {type(alone).__name__} does not compute what {type(whole).__name__} does with text")
