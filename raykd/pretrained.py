"""A model by the name that users give it: where it lies, and what is read from there."""

from pathlib import Path
from typing import Any


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
