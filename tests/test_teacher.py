"""The teacher's worker: what it sends is its model's own distribution, in whatever form, whatever else is in the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_student import ARCHITECTURES, VOCAB, saved_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from raykd.algorithms import GKD
from raykd.algorithms.base import Needs
from raykd.algorithms.token_divergences import JSD, ForwardKL, OfDistributions, ReverseKL, TopK
from raykd.collate import collate
from raykd.experiment import TeacherConfig
from raykd.payloads import payload_bytes
from raykd.records import Rollout, Row, Source, Totals
from raykd.student import Student
from raykd.teacher import PROBE_EVERY, Teacher
from raykd.teacher.heads import head_in_checkpoint

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
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt projected"])
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


def head_alone(folder: str) -> Any:
    return head_in_checkpoint(folder, torch.float32)


def test_the_head_is_found_under_the_name_that_old_checkpoints_give_it(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = saved_model(tmp_path, "gpt_neox", sizes | {"bos_token_id": 0, "eos_token_id": 0})
    assert "embed_out.weight" in load_file(Path(folder) / "model.safetensors")
    torch.testing.assert_close(head_alone(folder).weight, make_teacher(folder).head().weight, rtol=0, atol=0)


@pytest.mark.parametrize(("load", "wrong"), [(make_teacher, (1.0, None)), (head_alone, (1.0, None)), (head_alone, (0.125, 30.0))])
def test_an_architecture_that_does_more_to_its_logits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, wrong: tuple[float, float | None]
) -> None:
    folder = saved_model(tmp_path, "granite", ARCHITECTURES["granite"])
    load(folder)
    for module in ("student", "teacher.heads"):
        monkeypatch.setattr(f"raykd.{module}.logit_scale_and_softcap", lambda config: wrong)
    with pytest.raises(ValueError, match="the logits of granite are not its linear head"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 3.0, "lru_width": 32, "block_types": ["recurrent", "attention"]}),
        (
            "falcon_h1",
            {"lm_head_multiplier": 0.02, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
        ),
    ],
)
def test_scales_and_caps_by_other_names_are_known(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = saved_model(tmp_path, kind, sizes | {"head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0} | fields)
    make_teacher(folder)
    head_in_checkpoint(folder, torch.float32)


def test_what_has_fewer_bytes_is_sent(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "llama", ARCHITECTURES["llama"])  # 32 wide
    assert make_teacher(folder).payload() == "hidden"
    narrow = Teacher(folder, TeacherConfig(dtype="float32"), vocab_size=31)
    assert narrow.payload() == "logits"
    assert narrow.score(ROLLOUTS, Needs.SAMPLED).logits is None
    assert payload_bytes(5120, 32_000, torch.bfloat16) == {"hidden": 10_240, "logits": 128_000}
    assert payload_bytes(5120, 32_000, torch.bfloat16, 64)["top"] == 516
    assert "top" not in payload_bytes(5120, 32_000, torch.bfloat16, 32_000)
    assert make_teacher(folder).payload(top_k=15) == "top"
    assert make_teacher(folder).payload(top_k=16) == "hidden"


@pytest.mark.parametrize("of", [ForwardKL(), ReverseKL(), JSD()])
def test_every_payload_teaches_the_same(tmp_path: Path, of: OfDistributions) -> None:
    folder = saved_model(tmp_path / "student", "llama", ARCHITECTURES["llama"])
    wider = saved_model(tmp_path / "teacher", "llama", {**ARCHITECTURES["llama"], "hidden_size": 48})
    algorithm = GKD(divergence=TopK(k=5, of=of))
    found: list[list[Tensor]] = []
    for payload in ("hidden", "logits", "auto"):
        teacher = make_teacher(wider, payload=payload)
        student = Student(folder, teacher_head=teacher.head(), **SETTINGS)
        scores = teacher.score(ROLLOUTS, algorithm.needs, algorithm.top_k)
        assert (scores.top is not None) == (payload == "auto")
        rows = [Row(rollout=rollout, scores=scores, index=index) for index, rollout in enumerate(ROLLOUTS)]
        fields: dict[str, Any] = {"fetch": lambda block: block, "vocab_size": VOCAB, "lay": student.lay}
        micro = collate(rows, algorithm, Totals.of(rows), teacher_head=teacher.head(), **fields)
        loss, _ = student(micro, algorithm)
        found.append([loss, *torch.autograd.grad(loss, list(student.model.parameters()))])
    for hidden, logits, top in zip(*found, strict=True):
        torch.testing.assert_close(logits, hidden, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(top, hidden, atol=1e-6, rtol=1e-5)
        assert hidden.any()


def test_the_most_probable_tokens_of_another_response_are_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "llama", ARCHITECTURES["llama"])
    teacher, algorithm = make_teacher(folder), GKD(divergence=TopK(k=5))
    student = Student(folder, teacher_head=None, **SETTINGS)
    likeliest = int(own_logprobs(folder, (1, 2, 3), (7,)).argmax())
    written = replace(ROLLOUTS[0], tokens=(likeliest,))
    scores = teacher.score([written], algorithm.needs, algorithm.top_k)
    row = Row(rollout=replace(written, tokens=((likeliest + 1) % VOCAB,)), scores=scores)
    fields: dict[str, Any] = {"fetch": lambda block: block, "vocab_size": VOCAB, "lay": student.lay}
    micro = collate([row], algorithm, Totals.of([row]), teacher_head=None, **fields)
    with pytest.raises(ValueError, match="the tokens are not those scored"):
        student(micro, algorithm)
