"""Imports point downwards, and each third party has its place."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raykd"

# Lowest first. A module (or folder) imports from rows below its own, and from its own row without going in circles.
ROWS = (
    ("payloads", "records", "logprobs", "value", "provenance", "chat", "sources"),
    ("divergences", "surrogates", "head", "projection", "packing", "fused", "compiled", "cpu_products", "gpu_products"),
    (
        "algorithms",
        "prompts",
        "tokenise",
        "replay",
        "sharing",
        "gpu_sharing",
        "between_nodes",
        "weights",
        "tracking",
        "usage",
        "experiment",
    ),
    ("collate", "rank", "lora", "mismatch", "student", "engine", "pretrained", "language_model", "fragments"),
    ("rollout", "teacher", "reward", "learner"),
    ("actors", "fleet", "evaluation", "report"),
    ("workers", "start", "phases", "validation", "checkpoints", "train", "models", "planning", "run_directory"),
    ("run", "cli", "commands"),
)
STRANGERS = {"rollout", "teacher", "reward", "learner"}
"""Workers never import each other."""

HOMES = {
    "ray": {"actors", "fleet", "workers", "start", "replay", "run"},
    "vllm": {"engine", "rollout", "teacher"},
    "deepspeed": {"learner"},
    "wandb": {"tracking"},
    "liger_kernel": {"fused"},
    "nixl": {"between_nodes"},
    "numba": {"compiled"},
    "triton": {"gpu_products"},
    "llvmlite": {"compiled"},
}
"""Where a third party may be imported, at the top of a file or inside a function."""

ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}


def owner(path: Path) -> str:
    """The name in the table of the module or folder a file belongs to; '' for the package's own __init__."""
    relative = path.relative_to(PACKAGE)
    return "" if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; `from raykd import x` gives raykd.x, relative imports are resolved."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["raykd", *path.relative_to(PACKAGE).parts[:-1]]
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            )
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "raykd" else [str(base)]
            found += [(node.lineno, name) for name in names]
    return found


def offence(source: str, target: str) -> str | None:
    """Why a file of ``source`` may not import the dotted name ``target``; None where it may."""
    top, _, rest = target.partition(".")
    if top != "raykd":
        home = HOMES.get(top)
        return None if home is None or source in home else f"{top} is imported in {', '.join(sorted(home))} only"
    below = rest.split(".")[0]
    if below in ("", "__version__") or below == source:
        return None
    if below not in ROW_OF:
        return f"{below} is not in the table of tests/test_imports.py: give it a row"
    if {source, below} <= STRANGERS:
        return "workers do not import each other"
    if source == "" or ROW_OF[below] > ROW_OF[source]:
        return f"{below} stands above {source or 'the package'}"
    return None


def offences(files: list[Path]) -> list[str]:
    """Every offending import of ``files``, with file, line and reason."""
    found = []
    for path in files:
        source, place = owner(path), path.relative_to(PACKAGE.parent)
        if source and source not in ROW_OF:
            found.append(f"{place}: {source} is not in the table of tests/test_imports.py: give it a row")
            continue
        reasons = [(line, name, offence(source, name)) for line, name in imported(path)]
        found += [f"{place}:{line} imports {name}: {reason}" for line, name, reason in reasons if reason]
    return found


def test_every_import_points_downwards():
    assert offences(sorted(PACKAGE.rglob("*.py"))) == []


def test_no_two_modules_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        names = {name.split(".")[1] for _, name in imported(path) if name.startswith("raykd.")}
        graph.setdefault(owner(path), set()).update(names - {owner(path)})
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("records", "raykd.learner"),
        ("learner", "raykd.teacher"),
        ("divergences", "ray"),
        ("train", "wandb.sdk"),
        ("run", "raykd.unheard_of"),
        ("", "raykd.records"),
    ],
)
def test_a_wrong_import_is_an_offence(source: str, target: str):
    assert offence(source, target)


def test_a_module_outside_the_table_is_an_offence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stray = tmp_path / "raykd" / "stray.py"
    stray.parent.mkdir()
    stray.write_text("import torch\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", stray.parent)
    assert "stray is not in the table" in offences([stray])[0]


@pytest.mark.parametrize("modules", ["raykd", "raykd.divergences, raykd.algorithms, raykd.experiment, raykd.cli"])
def test_importing_the_light_modules_loads_no_heavy_one(modules: str):
    program = f"import sys, {modules}; print([name for name in {sorted(HOMES)} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == "[]"
