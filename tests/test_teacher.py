"""The teacher's worker: what it sends is its model's own distribution, in whatever form, whatever else is in the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_student import ARCHITECTURES, VOCAB, saved_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from raykd.algorithms import KD
from raykd.algorithms.base import Needs
from raykd.collate import collate
from raykd.experiment import TeacherConfig
from raykd.records import Rollout, Row, Source, Totals
from raykd.student import Student
from raykd.teacher import PROBE_EVERY, Teacher, payload_bytes

SETTINGS: dict[str, Any] = {"dtype": torch.float32, "vocab_size": VOCAB, "chunk": 4, "activation_checkpointing": False}
TEXTS = [((1, 2, 3), (7, 8, 9, 10)), ((4, 5), (11,)), ((1, 2, 3), (12, 13)), ((), (14, 15, 16)), ((6,), ())]
ROLLOUTS = [
    Rollout(prompt_id=str(index), sample=0, prompt_tokens=prompt, tokens=response, source=Source.DATASET)
    for index, (prompt, response) in enumerate(TEXTS)
]


def make_teacher(folder: str, **fields: Any) -> Teacher:
    return Teacher(folder, TeacherConfig(dtype="float32", **fields), vocab_size=VOCAB)


def own_logprobs(folder: str, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """Of the tokens that are predicted; ``[n, V]``."""
    logits = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([prompt + response])).logits[0]
    return logits[max(0, len(prompt) - 1) : len(prompt) + len(response) - 1].log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 8, 1000])
@pytest.mark.parametrize("payload", ["hidden", "logits"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_scores_are_the_models_own(tmp_path: Path, kind: str, payload: str, batch_tokens: int) -> None:
    folder = saved_model(tmp_path, kind, ARCHITECTURES[kind])
    teacher = make_teacher(folder, payload=payload, batch_tokens=batch_tokens)
    scores = teacher.score(ROLLOUTS, Needs.BOTH)
    for index, (prompt, response) in enumerate(TEXTS):
        first = 0 if prompt else 1
        expected, found = own_logprobs(folder, prompt, response), scores.row(index)
        sent = teacher.head()(found.hidden) if found.hidden is not None else found.logits
        assert sent is not None
        torch.testing.assert_close(sent[first:].log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sent[first:].logsumexp(-1), found.log_normaliser[first:], atol=1e-5, rtol=1e-5)
        chosen = expected.gather(-1, torch.tensor(response[first:], dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[first:], chosen, atol=1e-5, rtol=1e-5)


def test_without_need_of_every_log_prob_the_probe_is_sparse_and_starts_at_the_first_predicted_token(tmp_path: Path) -> None:
    teacher = make_teacher(saved_model(tmp_path, "llama", ARCHITECTURES["llama"]))
    long = [replace(rollout, tokens=tuple(index % VOCAB for index in range(40))) for rollout in ROLLOUTS]
    every, some = (teacher.score(long, needs) for needs in (Needs.BOTH, Needs.DISTRIBUTION))
    for index, rollout in enumerate(long):
        expected, found = every.row(index), some.row(index)
        first = 0 if rollout.prompt_tokens else 1
        looked_at = [row for row in range(40) if not found.logprobs[row].isnan()]
        assert looked_at == list(range(first, 40, PROBE_EVERY))
        torch.testing.assert_close(found.logprobs[looked_at], expected.logprobs[looked_at])
        torch.testing.assert_close(found.log_normaliser[looked_at], expected.log_normaliser[looked_at])


def test_what_has_fewer_bytes_is_sent(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "llama", ARCHITECTURES["llama"])  # 32 wide
    assert make_teacher(folder).payload == "hidden"
    narrow = Teacher(folder, TeacherConfig(dtype="float32"), vocab_size=31)
    assert narrow.payload == "logits"
    assert narrow.score(ROLLOUTS, Needs.SAMPLED).logits is None
    assert payload_bytes(5120, 32_000, torch.bfloat16) == {"hidden": 10_240, "logits": 128_000}


def test_both_payloads_teach_the_same(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "student", "llama", ARCHITECTURES["llama"])
    wider = saved_model(tmp_path / "teacher", "llama", {**ARCHITECTURES["llama"], "hidden_size": 48})
    found: list[list[Tensor]] = []
    for payload in ("hidden", "logits"):
        student, teacher = (
            Student(folder, teacher_head=make_teacher(wider).head(), **SETTINGS),
            make_teacher(wider, payload=payload),
        )
        scores = teacher.score(ROLLOUTS, Needs.DISTRIBUTION)
        rows = [
            Row(rollout=rollout, scores=scores, index=index, teacher_logprobs=tuple(scores.row(index).logprobs.tolist()))
            for index, rollout in enumerate(ROLLOUTS)
        ]
        fields: dict[str, Any] = {"fetch": lambda block: block, "vocab_size": VOCAB, "pad_id": 0, "lay": student.lay}
        micro = collate(rows, KD(), Totals.of(rows), teacher_head=teacher.head(), **fields)
        loss, _ = student(micro, KD())
        found.append([loss, *torch.autograd.grad(loss, list(student.model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert one.any()
