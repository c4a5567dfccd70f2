"""What a result was measured on: beside every row of ``results/``."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from raykd.provenance import revision, versions


def stamp() -> dict[str, Any]:
    """Date, machine, revision of the package, versions of the libraries."""
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    return {"date": date, "machine": _machine(), "code": revision("."), "libraries": versions("trl", "liger-kernel")}


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in described.splitlines() if "model name" in line]
    kind = "AMX" if "amx_tile" in described else "AVX-512" if "avx512f" in described else platform.machine()
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, {kind}"
