"""The mismatch of log-probs is a mean over the tokens that an engine recorded."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from overlap import Sleepers
from rich.console import Console

from raykd.algorithms import GKD, SFT
from raykd.algorithms.base import Mixture, Progress
from raykd.experiment import Stage
from raykd.mismatch import RECORDED, over_recorded, with_mismatch
from raykd.phases import Phase, Position
from raykd.records import Rollout, Row, Source
from raykd.tracking import Tracker
from raykd.train import learn


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


def test_a_run_says_where_engine_and_learner_disagree_before_anything_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture that one of them gets wrong; later the learner's own steps lie between them."""
    printed = io.StringIO()
    rows = [Row(rollout=Rollout(prompt_id="p", sample=0, prompt_tokens=(1,), tokens=(2,), source=Source.STUDENT))]
    phase = Phase(Progress(step=0, steps=3, batch_size=1, coin=0.0, held=0), Mixture(student=1.0), rows)
    workers: Any = Sleepers({"learn": 0.0})
    data: Any = SimpleNamespace(text=None)
    at, stage = Position(), Stage(algorithm=GKD(), steps=3, batch_size=1)
    said = []
    with Tracker(tmp_path, {}, name="x", wandb=False, project="", console=Console(file=printed, width=300)) as tracker:
        for mismatch in (0.05, 0.93):
            monkeypatch.setattr(Sleepers, "step", lambda *_, mismatch=mismatch: {"loss": 0.0, "logprob_mismatch": mismatch})
            for at.step in (0, 1):
                before = printed.getvalue()
                learn(phase, stage, workers, data, tracker, at)
                said.append(printed.getvalue().removeprefix(before))
    assert "engine and learner disagree about this student by 0.93 nats a token" in said[2]
    assert not any("disagree" in text for text in (*said[:2], said[3]))
