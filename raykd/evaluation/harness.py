"""Tasks of EleutherAI's lm-evaluation-harness, where it is installed."""

from collections.abc import Sequence
from importlib.util import find_spec


def check_harness() -> None:
    """Raise ValueError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError("harness_tasks needs lm-evaluation-harness, which is not installed: pip install 'raykd[harness]'")


def run_harness(model: str, tasks: Sequence[str], dtype: str) -> dict[str, dict[str, float]]:
    """Task -> measure -> value, under the harness's own names, e.g. ``acc,none`` and ``acc_stderr,none``."""
    import torch
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]  optional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = {"pretrained": model, "dtype": dtype}
    try:
        found = simple_evaluate(model="hf", model_args=arguments, tasks=list(tasks), batch_size="auto", device=device)
    except (KeyError, ValueError) as error:
        raise ValueError(f"harness_tasks {', '.join(tasks)}: {error}") from error
    return {
        task: {name: value for name, value in measures.items() if isinstance(value, float)}
        for task, measures in found["results"].items()
    }
