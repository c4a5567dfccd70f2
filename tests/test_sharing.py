"""Memory of one process that others read: every byte, no copy, and gone with its owner."""

import mmap
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from raykd import sharing
from raykd.sharing import ALIGNMENT, PIECE, Region, Segment, checksum, edition, let_go, offsets

ROOT = Path(__file__).parent.parent
SIZES = [[0], [1], [7, 8, 9, 64, 65], [PIECE - 1, 3, 2 * PIECE + 13]]


def parts(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def written(segment: Segment, of: list[np.ndarray], number: int) -> tuple[Region, int]:
    with ThreadPoolExecutor(2) as pool:
        return segment.write(number, of, pool)


@pytest.mark.parametrize("compiled", [False, True], ids=["in blocks", "compiled"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_written_is_read_whole_and_summed_up_on_the_way(
    sizes: list[int], compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sharing, "COMPILED", 0 if compiled else 2**62)
    first, second = parts(sizes), parts(sizes, seed=1)
    segment = Segment(2 * offsets(sizes)[-1])
    regions = [written(segment, first, 5), written(segment, second, 6)]
    for (region, total), of, number in zip(regions, (first, second), (5, 6), strict=True):
        data = region.open()
        assert edition(data) == number and not data.flags.writeable
        for start, part in zip(offsets(sizes), of, strict=False):
            assert start % ALIGNMENT == 0 and np.array_equal(data[start : start + part.size], part)
        words = np.concatenate([np.array([number], np.uint64), *(np.pad(p, (0, -p.size % 8)).view(np.uint64) for p in of)])
        assert total == checksum(data) == int(words.sum(dtype=np.uint64))


def test_shorter_parts_leave_nothing_of_longer_ones():
    segment = Segment(4096)
    written(segment, [np.full(1000, 255, np.uint8)], 1)
    segment.begin()
    region, total = written(segment, parts([3, 70]), 2)
    assert total == checksum(region.open())


def test_the_memory_is_the_same_at_the_next_writing():
    segment = Segment(4096)
    region, _ = written(segment, parts([100]), 1)
    data = region.open()
    segment.begin()
    again, _ = written(segment, parts([100], seed=1), 2)
    assert again == region
    assert edition(data) == 2 and np.array_equal(data[ALIGNMENT : ALIGNMENT + 100], parts([100], seed=1)[0])


def resident(name: str) -> int:
    """Bytes of shared memory with ``name`` in its path that count as this process's."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if not first.endswith(":"):
            counts = others[0].endswith("s") and name in line
        elif first == "Rss:" and counts:
            found += int(others[0]) * 1024
    return found


def test_memory_that_is_let_go_stays_what_it_is():
    segment = Segment(PIECE)
    region, total = written(segment, parts([PIECE // 2]), 1)
    data = region.open()
    own = mmap.mmap(os.open(region.path, os.O_RDWR), PIECE, mmap.MAP_PRIVATE)
    own[:5] = b"mine!"
    before = resident("/memfd:raykd")
    assert checksum(data) == total and before >= PIECE // 2
    let_go("/memfd:another")
    assert resident("/memfd:raykd") >= before
    let_go("/memfd:raykd")
    assert resident("/memfd:raykd") == 0
    assert checksum(data) == total and own[:5] == b"mine!"


OWNER = """
    import pickle, sys, time
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    from raykd.sharing import Segment
    segment = Segment(1 << 20)
    with ThreadPoolExecutor(1) as pool:
        region, total = segment.write(3, [np.arange(100_000, dtype=np.uint8)], pool)
    sys.stdout.buffer.write(pickle.dumps((region, total)))
    sys.stdout.flush()
    time.sleep(600)
"""


def test_a_killed_owner_leaves_nothing_but_what_others_still_read():
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(OWNER)], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None
    try:
        with owner.stdout:
            region, total = pickle.load(owner.stdout)
        assert os.readlink(region.path).startswith("/memfd:"), "it has no name that could be left"
        data = region.open()
        assert checksum(data) == total
    finally:
        owner.kill()
        owner.wait(timeout=60)
    assert checksum(data) == total, "whoever has mapped it keeps it"
    assert not os.path.exists(region.path)
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()).open()"
    late = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(region), capture_output=True, cwd=ROOT, check=False)
    assert late.returncode == 1 and b"cannot be mapped" in late.stderr and b"both must be alive" in late.stderr


def test_another_memory_at_the_same_place_is_not_taken_for_it():
    segment = Segment(4096)
    region, _ = written(segment, parts([8]), 1)
    with pytest.raises(ValueError, match=r"cannot be mapped \(it has ended\)"):
        Region(path=region.path, inode=region.inode + 1, start=0, size=72).open()
