"""The benchmarks that measure the loop itself; the others are run by hand."""

import pytest
from overlap import METHODS, measure

FAST = {"generate": 0.01, "score": 0.01, "learn": 0.01}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_simulated_stages_take_the_time_that_they_are_told(method: str, max_staleness: int) -> None:
    algorithm, _ = METHODS[method]
    numbers = measure(algorithm, 16, FAST, max_staleness)
    assert 0 < numbers["of_bound"] <= 1
    if method == "GKD":  # every row is of the phase before, or of as many before as may run ahead
        assert numbers["staleness"] == pytest.approx(sum(min(step, max_staleness) for step in range(16)) / 16)
