"""A model by the name that users give it: where it lies, what is read there, which ids it knows and which end a response."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raykd.tokenise import eos_id


def locate(who: str, name: str) -> str:
    """The whole path of a model's folder, or of a run directory's student, since workers have working directories of their own;
    else a name on the Hub. Raises ValueError, with ``who`` asks, for a folder that is missing."""
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"{who} {name}: no such folder; give a Hugging Face model folder, a run directory, or a name on the Hub")
    if (path / "student" / "config.json").is_file():
        path = path / "student"
    return str(path.resolve()) if path.is_dir() else name


def load(who: str, name: str, loader: Any) -> Any:
    """What a class of transformers, ``loader``, reads there; ValueError where it cannot."""
    folder = locate(who, name)
    try:
        return loader.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{who} {name} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_config(who: str, name: str) -> PreTrainedConfig:
    """The configuration of a causal model of text; ValueError for any other."""
    config = load(who, name, AutoConfig)
    check_kind(f"{who} {name}", config)
    return config


def check_kind(who: str, config: PreTrainedConfig) -> None:
    """Raise ValueError unless it is the configuration of a causal model of text."""
    if config.is_encoder_decoder:
        raise ValueError(f"{who}: {config.model_type} is an encoder-decoder model; raykd distils causal models")
    if config.get_text_config() is not config:
        raise ValueError(
            f"{who}: {config.model_type} takes more than text; `raykd language-model MODEL FOLDER` writes the language model of "
            "one alone: name that folder"
        )


def load_model(folder: str, loader: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """A model with all its weights; ValueError for a checkpoint that lacks some, which transformers would draw at random."""
    model, found = loader.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} among them: it is "
            "incomplete, or another kind of model"
        )
    return find_body(model)


def find_body(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose ``base_model`` is its body: Llama 4's class says that it is called otherwise than it is."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    return model


def known_ids(who: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """How many of the tokenizer's ids, from 0, a model has rows for: all, or all but tokens that were added at the end and that
    texts do not have (Gemma 3's 1B: the one of images). ValueError where others are missing."""
    rows: Any = config.vocab_size
    added: Any = tokenizer.added_tokens_decoder
    if not set(range(rows, len(tokenizer))) <= set(added):
        raise ValueError(
            f"{who}: vocab_size {rows} is smaller than the tokenizer's {len(tokenizer)} ids; they do not belong together"
        )
    return min(rows, len(tokenizer))


def shared_ids(names: tuple[str, str], tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]) -> int:
    """How many ids, from 0, are the same tokens in both: all, or all but those that were added to one of them alone (Qwen3's
    ``<think>``, which Qwen2.5 has not). ValueError, with the ``names`` of the two, where they differ in more."""
    vocabularies: Any = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    shared = min(map(len, tokenizers))
    added = set().union(*(tokenizer.added_tokens_decoder for tokenizer in tokenizers))
    for index in sorted(set().union(*vocabularies)):
        first, second = (vocabulary.get(index) for vocabulary in vocabularies)
        if first != second and not (index >= shared and index in added):
            raise ValueError(
                f"{names[0]} and {names[1]} have different tokenizers (id {index} is {first!r} and {second!r}): their "
                "distributions cannot be compared; choose a pair that shares one"
            )
    return shared


def eos_ids(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's EOS, then what else the model's ``generation_config.json`` lists."""
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:  # it has none
        config = GenerationConfig()
    listed = config.eos_token_id or []
    if isinstance(listed, int):  # copied from the architecture's configuration it may be that one's default, an ordinary token
        listed = [] if config._from_model_config else [listed]
    own = eos_id(tokenizer)
    return own, *(token for token in dict.fromkeys(listed) if token != own and token < len(tokenizer))
