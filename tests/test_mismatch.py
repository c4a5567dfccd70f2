"""The mismatch of log-probs is a mean over the tokens that an engine recorded."""

import pytest
import torch

from raykd.algorithms import SFT
from raykd.mismatch import RECORDED, over_recorded, with_mismatch


def test_tokens_that_nobody_recorded_do_not_thin_the_mean() -> None:
    student = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]).log()
    recorded = torch.tensor([0.25, 0.25, torch.nan]).log()  # off by log 2, right, of the data set
    found = with_mismatch(SFT().per_token)(student, None, torch.tensor([0, 0, 1]), {RECORDED: recorded})
    means = {name: float(values.mean()) for name, values in found.items()}
    assert means["logprob_mismatch"] == pytest.approx(0.6931471805599453 / 3)
    metrics = over_recorded(means)
    assert metrics["logprob_mismatch"] == pytest.approx(0.6931471805599453 / 2)
    assert "recorded_share" not in metrics and metrics["nll"] == pytest.approx(means["nll"])


def test_a_term_without_recorded_tokens_has_no_mismatch() -> None:
    means = {"sft/logprob_mismatch": 0.0, "sft/recorded_share": 0.0, "logprob_mismatch": 0.1, "recorded_share": 0.5, "loss": 1.0}
    assert over_recorded(means) == {"loss": 1.0, "logprob_mismatch": 0.2}
