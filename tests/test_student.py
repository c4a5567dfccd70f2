"""The student module: architectures whose logits are more than a linear head, dropout, and padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, T5Config
from transformers.modeling_layers import GradientCheckpointingLayer

from raykd.algorithms import SFT
from raykd.collate import collate
from raykd.records import Rollout, Row, Source, Totals
from raykd.student import Student

VOCAB = 61
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.5, "pad_token_id": 0},
    "cohere": {**LLAMA_LIKE, "logit_scale": 0.25, "pad_token_id": 0},
    "cohere2": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 3, "initializer_range": 0.3, "pad_token_id": 0},
    "granite": {**LLAMA_LIKE, "logits_scaling": 8.0},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCAB,
        "resid_pdrop": 0.5,
        "attn_pdrop": 0.5,
        "embd_pdrop": 0.5,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "dropout": 0.5,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "opt projected": {  # as OPT-350m: states are projected to the width of the embeddings after the last layer
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "max_position_embeddings": 64,
    },
}


def saved_model(folder: Path, kind: str, fields: dict[str, Any]) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split()[0], **fields)).save_pretrained(folder)
    return str(folder)


def make_student(folder: str) -> Student:
    return Student(folder, dtype=torch.float32, vocab_size=VOCAB, chunk=4, teacher_head=None, activation_checkpointing=False)


def sft_loss(student: Student, rows: list[Row], totals: Totals) -> Tensor:
    micro = collate(rows, SFT(), totals, fetch=lambda block: block, teacher_head=None, vocab_size=VOCAB)
    return student(micro=micro, algorithm=SFT())[0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_the_models_own_logits_whatever_the_padding(tmp_path: Path, kind: str) -> None:
    folder = saved_model(tmp_path, kind, ARCHITECTURES[kind])
    student = make_student(folder)
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(1, VOCAB, (length,), generator=generator).tolist()) for length in (12, 5, 9)]
    rows = [Row(rollout=Rollout(prompt_id="a", sample=0, prompt_tokens=x[:3], tokens=x[3:], source=Source.DATASET)) for x in ids]
    totals = Totals.of(rows)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = torch.cat([model(torch.tensor([x])).logits[0, 2:-1] for x in ids])
    expected = cross_entropy(logits, torch.tensor([token for x in ids for token in x[3:]]))
    expected.backward()
    assert sum(sft_loss(student, [row], totals).item() for row in rows) == pytest.approx(expected.item(), abs=1e-5)
    loss = sft_loss(student, rows, totals)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    for (name, mine), theirs in zip(student.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5, msg=name)


EXPERTS = {**LLAMA_LIKE, "num_experts_per_tok": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {**EXPERTS, "num_local_experts": 4, "router_jitter_noise": 0.5}),
        ("phimoe", EXPERTS),
        ("opt", ARCHITECTURES["opt"]),
    ],
)
def test_nothing_is_random_where_layers_are_computed_again_or_not(
    tmp_path: Path, kind: str, fields: dict[str, Any], again: bool
) -> None:
    folder = saved_model(tmp_path, kind, fields)
    student = Student(folder, dtype=torch.float32, vocab_size=VOCAB, chunk=4, teacher_head=None, activation_checkpointing=again)
    ids = torch.arange(1, 21)[None]
    layers = [layer for layer in student.modules() if isinstance(layer, GradientCheckpointingLayer)]
    calls: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, *_: calls.append(layer))
    states = student.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    own = AutoModelForCausalLM.from_pretrained(folder).base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(states, own, atol=1e-5, rtol=1e-5)
    states.sum().backward()
    assert len(calls) == (1 + again) * len(layers) > 0


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", LLAMA_LIKE),
        ("gpt2", ARCHITECTURES["gpt2"]),
        ("mixtral", {**EXPERTS, "num_local_experts": 3}),
        ("qwen3_moe", {**EXPERTS, "num_experts": 3, "moe_intermediate_size": 16}),
    ],
)
def test_weights_leave_under_the_names_and_in_the_parts_of_the_checkpoint(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    """Of a layer's experts transformers makes one tensor."""
    stored = load_file(Path(saved_model(tmp_path, kind, fields)) / "model.safetensors")
    student = make_student(str(tmp_path))
    tied = {id(tensor): name for name, tensor in reversed(student.state().items())}
    state = {name: student.whole(name) for name in tied.values()}
    published = student.as_in_checkpoint(state)
    one_by_one = [student.as_in_checkpoint({name: tensor}) for name, tensor in state.items()]
    assert len(published) == sum(map(len, one_by_one)) == len(stored)
    for name, tensor in stored.items():
        assert torch.equal(published[name], tensor)
        assert any(name in part and torch.equal(part[name], tensor) for part in one_by_one)


def test_an_architecture_that_does_more_to_its_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_model(tmp_path, "granite", ARCHITECTURES["granite"])
    monkeypatch.setattr("raykd.student.logit_scale_and_softcap", lambda config: (1.0, None))
    with pytest.raises(ValueError, match="the logits of granite are not its linear head"):
        make_student(folder)


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=VOCAB).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder"):
        make_student(str(tmp_path))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "llama", {**LLAMA_LIKE, "vocab_size": VOCAB - 1})
    with pytest.raises(ValueError, match="60 tokens in the model, 61 in the tokenizer"):
        make_student(folder)


def test_a_student_whose_checkpoint_forgot_that_it_samples_can_be_saved(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "given", "llama", ARCHITECTURES["llama"])
    (tmp_path / "given" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]})
    )
    make_student(folder).model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"], saved["eos_token_id"]) == (0.9, 0.6, True, [2, 5])
