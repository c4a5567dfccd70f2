"""Packed texts beside each text alone: states, gradients, and what is computed."""

from typing import Any

import pytest
import torch
from test_student import ARCHITECTURES, LLAMA_LIKE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raykd.packing import can_pack, packed, padded
from raykd.student import dropout_rates

PROMPTS = [(1, 2, 3), (4, 5), (1, 2, 3), (), (6,), (1, 2, 3), ()]
RESPONSES = [(7, 8, 9, 10), (11,), (12, 13), (14, 15, 16), (), (17, 18, 19), (20, 21)]
PACKABLE = {kind: fields for kind, fields in ARCHITECTURES.items() if kind != "gemma2"}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": ARCHITECTURES["gemma2"],
    "mistral": {**LLAMA_LIKE, "sliding_window": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
}


def make_model(kind: str, fields: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **fields)
    for name in dropout_rates(config):
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).double()


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
    model = make_model(kind, PACKABLE[kind])
    expected = [alone(model, *text) for text in zip(PROMPTS, RESPONSES, strict=True)]
    wanted = gradients(model, expected)
    assert can_pack(model)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for lay in (packed, padded):
        layout = lay(PROMPTS, RESPONSES, 0)
        found = predicted(layout.states(model.base_model), layout.predictors)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        for one, other in zip(gradients(model, found), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_whose_attention_does_more_is_not_packed_and_stays_as_it_was(kind: str) -> None:
    model = make_model(kind, OTHERS[kind])
    before = model.config._attn_implementation
    assert not can_pack(model)
    assert model.config._attn_implementation == before


def test_nothing_is_computed_twice_and_padding_not_at_all() -> None:
    layout = packed(PROMPTS, RESPONSES, 0)
    prompts = sum(len(prompt) for prompt in set(PROMPTS))
    assert layout.input_ids.shape == (1, prompts + sum(max(0, len(response) - 1) for response in RESPONSES))


def test_nothing_to_read_is_one_token() -> None:
    for lay in (packed, padded):
        layout = lay([], [], 3)
        assert layout.input_ids.tolist() == [[3]]
        assert layout.predictors == []
