"""Packed texts beside each text alone: states, gradients, and what is computed."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_student import ARCHITECTURES, LLAMA_LIKE
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from raykd.packing import PADDING, Ragged, can_pack, packed, packed_attention, padded
from raykd.student import dropout_rates

PROMPTS = [(1, 2, 3), (4, 5), (1, 2, 3), (), (6,), (1, 2, 3), ()]
RESPONSES = [(7, 8, 9, 10), (11,), (12, 13), (14, 15, 16), (), (17, 18, 19), (20, 21)]
STRONG = {"initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Weights with which attention looks at some positions more than at others, as those of models that have learned."""
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PACKABLE: dict[str, dict[str, Any]] = ARCHITECTURES | {
    "gemma2": {
        **ARCHITECTURES["gemma2"],
        **STRONG,
        "attn_logit_softcapping": 0.5,
        "query_pre_attn_scalar": 8,
        "sliding_window": 3,
    },
    "gemma3_text": {**LLAMA_LIKE, **STRONG, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3},
    "mistral": {**LLAMA_LIKE, **STRONG, "sliding_window": 3},
    "mistral wide": {**LLAMA_LIKE, **STRONG, "sliding_window": 4096},
    "phi3": {**LLAMA_LIKE, **STRONG, "sliding_window": 3},
}
OTHERS: dict[str, dict[str, Any]] = {
    "phimoe": {**LLAMA_LIKE, **EXPERTS, **STRONG, "sliding_window": 4096},  # its attention learns of its window by a mask alone
    "gpt_oss": {**LLAMA_LIKE, **EXPERTS, **STRONG, "head_dim": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
}


def make_model(kind: str, fields: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **fields)
    for name in dropout_rates(config):
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def alone(model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """The states that predict a response's tokens, the first of a text without a prompt left out."""
    text = torch.tensor([prompt + response])
    states = model.base_model(input_ids=text, use_cache=False).last_hidden_state[0]
    return states[max(0, len(prompt) - 1) : len(prompt) + len(response) - 1]


def predicted(states: Tensor, predictors: list[list[int]]) -> list[Tensor]:
    return [states[at if prompt else at[1:]] for prompt, at in zip(PROMPTS, predictors, strict=True)]


def gradients(model: PreTrainedModel, states: list[Tensor]) -> list[Tensor]:
    """Of a mean that weighs every entry differently."""
    flat = torch.cat(states).flatten()
    parameters = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((flat * torch.linspace(-1, 1, len(flat))).mean(), parameters))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", PACKABLE)
def test_states_and_gradients_are_those_of_each_text_alone(kind: str, checkpointed: bool) -> None:
    model = make_model(kind, PACKABLE[kind]).double()
    expected = [alone(model, *text) for text in zip(PROMPTS, RESPONSES, strict=True)]
    wanted = gradients(model, expected)
    assert can_pack(model)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for lay in (packed, padded):
        layout = lay(PROMPTS, RESPONSES)
        found = predicted(layout.states(model.base_model), layout.predictors)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        for one, other in zip(gradients(model, found), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_whose_attention_does_more_is_not_packed_and_stays_as_it_was(kind: str) -> None:
    model = make_model(kind, OTHERS[kind])
    before = model.config.to_dict(), [getattr(module, "sliding_window", None) for module in model.modules()]
    assert not can_pack(model)
    assert before == (model.config.to_dict(), [getattr(module, "sliding_window", None) for module in model.modules()])
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["gemma2", "mistral", "llama"])
def test_a_packed_model_still_writes_as_its_own_code_does(kind: str) -> None:
    model: Any = make_model(kind, PACKABLE[kind]).double().eval()
    rules = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    expected = model.generate(prompt, generation_config=rules).tolist()
    assert can_pack(model)
    assert model.generate(prompt, generation_config=rules).tolist() == expected


def test_capped_scores_are_not_left_out_where_texts_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' usual attention leaves them out without a word."""
    ids = torch.tensor([PROMPTS[0] + RESPONSES[0]])
    model = make_model("gemma2", PACKABLE["gemma2"])
    expected = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert (model(ids).logits - expected).abs().max() > 0.1
    monkeypatch.setattr("raykd.packing.TOLERANCE", {torch.float32: -1.0})
    assert not can_pack(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_nothing_is_computed_twice_and_padding_not_at_all() -> None:
    layout = packed(PROMPTS, RESPONSES)
    prompts = sum(len(prompt) for prompt in set(PROMPTS))
    assert layout.input_ids.shape == (1, prompts + sum(max(0, len(response) - 1) for response in RESPONSES))


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, *longest: int, **settings: Any) -> Tensor:
    """What torch.nn.attention.varlen computes on a GPU, text by text: ``[S, heads, width]``, the last query sees every key."""
    before, behind = settings.pop("window_size")
    assert behind == 0
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        assert (q1 - q0 <= longest[0]) and (k1 - k0 <= longest[1])
        texts = [heads.transpose(0, 1) for heads in (q[q0:q1], k[k0:k1], v[k0:k1])]
        seen = torch.ones(int(q1 - q0), int(k1 - k0), dtype=torch.bool).tril(first := int(k1 - k0 - (q1 - q0)))
        seen = seen.triu(first - before) if before >= 0 else seen
        outputs.append(scaled_dot_product_attention(texts[0], texts[1], texts[2], seen, **settings).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("texts", [(PROMPTS, RESPONSES), (PROMPTS[1:3], RESPONSES[1:3])], ids=["shared prompts", "none shared"])
def test_one_call_for_all_segments_is_the_same(
    texts: Any, key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_reference)
    segments = packed(texts[0], texts[1]).segments
    assert segments is not None
    size = segments[-1].own.stop
    query, key, value = [torch.randn(1, count, size, 8, dtype=torch.float64) for count in (4, key_heads, key_heads)]
    rules: dict[str, Any] = {"scaling": 0.3, "segments": segments, "sliding_window": window}
    expected, _ = packed_attention(torch.nn.Module(), query, key, value, None, **rules)
    ragged = Ragged.of(segments, torch.device("cpu"))
    assert (ragged.keys is None) == (len(set(texts[0])) == len(texts[0]))
    torch.testing.assert_close(ragged.attend(query, key, value, 0.3, window), expected)


def test_bfloat16_that_is_learned_from_is_attended_in_float32_on_a_cpu_and_rounded_once() -> None:
    segments = packed(PROMPTS, RESPONSES).segments
    assert segments is not None
    shape = 1, 2, segments[-1].own.stop, 16

    def attended(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        heads = [torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_() for _ in range(3)]
        output, _ = packed_attention(torch.nn.Module(), heads[0], heads[1], heads[2], None, segments=segments)
        return [output, *torch.autograd.grad(output, heads, torch.ones_like(output))]

    for rounded, exact in zip(attended(torch.bfloat16), attended(torch.float32), strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0)


def test_nothing_to_read_is_one_token() -> None:
    for lay in (packed, padded):
        layout = lay([], [])
        assert layout.input_ids.tolist() == [[PADDING]]
        assert layout.predictors == []
