"""A model by the name that users give it: where it lies, what is read from there, and which ids end its responses."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from raykd.prompts import eos_id


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
