"""What an actor's process is given at its start."""

import os
import platform
import subprocess
import sys

import pytest

from raykd.fleet import environment

COUNT_FAULTS = """
import resource, numpy
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return [numpy.ones(size << 17) for size in (4, 16, 30)]  # MiB
work()
before = faults()
for _ in range(20):
    work()
print(faults() - before)
"""


def faults(env: dict[str, str]) -> int:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT_FAULTS]
    return int(subprocess.run(command, env=bare | env, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are glibc's settings")
def test_a_process_on_cpu_keeps_the_memory_that_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    kept, given_back = faults(environment(1, on_cpu=True)), faults(environment(1, on_cpu=False))
    assert kept < given_back / 20


def test_threads_wait_without_spinning_where_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert environment(2, on_cpu=True, crowded=True)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in environment(2, on_cpu=True)


def test_the_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not {"GLIBC_TUNABLES", "OMP_WAIT_POLICY"} & set(environment(1, on_cpu=True, crowded=True))
