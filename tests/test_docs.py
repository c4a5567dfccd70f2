"""What the documents name exists: their Python runs, their options and fields are there."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from raykd import algorithms, cli, experiment
from raykd.experiment import Experiment

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for path in sorted(ROOT.glob("**/*.md")) if not {"LOG.md", ".venv", "build"} & {*path.relative_to(ROOT).parts}]
NAMES = {name: getattr(module, name) for module in (algorithms, experiment) for name in module.__all__}


def models(annotation: Any) -> list[type[BaseModel]]:
    """The values that a field may have, as far as they have fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]


def has(owners: list[type[BaseModel]], path: list[str]) -> bool:
    """Whether ``learner.lora.rank`` is a field; numbers count items of a tuple."""
    if not path or path[0].isdigit():
        return not path or has(owners, path[1:])
    return any(has(models(owner.model_fields[path[0]].annotation), path[1:]) for owner in owners if path[0] in owner.model_fields)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path, monkeypatch: pytest.MonkeyPatch):
    text, started = document.read_text(), []
    monkeypatch.setattr(cli, "main", started.append)
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S):
        exec(compile(block, document.name, "exec"), {"__name__": "__main__"})
        assert isinstance(started.pop(), Experiment), block
    for option in re.findall(r"--([a-z]+(?:\.[a-z0-9-]+)+)", text):
        assert has([Experiment], option.replace("-", "_").split(".")), f"no option --{option}"
    for name in re.findall(r"`(\w+(?:\.\w+)+)(?:=[^`]*)?`", text):
        owner, *path = name.split(".")
        if path[-1] in ("json", "jsonl", "py"):
            continue
        if owner in Experiment.model_fields:
            assert has([Experiment], [owner, *path]), f"no field {name}"
        elif owner in NAMES:
            assert has([NAMES[owner]], path) or hasattr(NAMES[owner], path[0]), f"no field {name}"
