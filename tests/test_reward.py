"""Rewards: a user's function, a classifier, and what is refused of either."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from example_text import text, text_tokenizer
from transformers import AutoConfig, LlamaForSequenceClassification

from raykd.experiment import ClassifierReward, FunctionReward
from raykd.records import Rollout, Source
from raykd.reward import Reward, load_function
from raykd.tokenise import eos_id

FUNCTIONS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weight:
    value: float = 10

def length(prompts, responses):
    return [len(prompt) + Weight().value * len(response) for prompt, response in zip(prompts, responses)]

def one_too_few(prompts, responses):
    return [0.0] * (len(prompts) - 1)

def not_a_number(prompts, responses):
    return [0.0, float("nan")]
"""


def rollouts(*pairs: tuple[str, str]) -> list[Rollout]:
    tokenizer = text_tokenizer()
    encoded = [[tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in pair] for pair in pairs]
    return [
        Rollout(prompt_id=f"p{index}", sample=0, prompt_tokens=prompt, tokens=(*answer, eos_id(tokenizer)), source=Source.STUDENT)
        for index, (prompt, answer) in enumerate(encoded)
    ]


PAIRS = (("1905-11-03\n", "the third of November, 1905"), ("1950-01-02\n", "in 1950"))


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_a_function_sees_the_texts_without_special_tokens(functions: str) -> None:
    reward = Reward(FunctionReward(name=f"{functions}:length"), tokenizer=text().tokenizer.as_posix())
    assert reward.rate(rollouts(*PAIRS)) == [len(prompt) + 10 * len(answer) for prompt, answer in PAIRS]


def test_a_function_may_be_in_a_package() -> None:
    assert load_function("operator:add") is __import__("operator").add


@pytest.mark.parametrize("name", ["no.such.module:f", "operator:no_such_function", "no_such_file.py:f", "length", "wrong.py:f"])
def test_a_function_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"reward.name {name}"):
        load_function(name)


def test_answers_that_are_no_rewards_are_refused(functions: str) -> None:
    tokenizer = text().tokenizer.as_posix()
    with pytest.raises(ValueError, match="1 numbers for 2 responses"):
        Reward(FunctionReward(name=f"{functions}:one_too_few"), tokenizer).rate(rollouts(*PAIRS))
    with pytest.raises(ValueError, match="nan for p1, response 'in 1950'"):
        Reward(FunctionReward(name=f"{functions}:not_a_number"), tokenizer).rate(rollouts(*PAIRS))


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_rates_prompt_and_response(tmp_path: Path, labels: int) -> None:
    """The log-probability of the label, or the single output; the same one at a time and padded in batches."""
    tokenizer = text_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **shape, vocab_size=len(tokenizer), num_labels=labels)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = Reward(ClassifierReward(path=str(tmp_path), label=labels - 1), tokenizer=str(tmp_path))
    expected = []
    for prompt, answer in PAIRS:
        logits = model(**tokenizer(prompt + answer, return_tensors="pt")).logits[0].detach()
        expected.append(float((logits if labels == 1 else logits.log_softmax(-1))[labels - 1]))
    assert reward.rate(rollouts(*PAIRS)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=f"has {labels} labels"):
        Reward(ClassifierReward(path=str(tmp_path), label=labels), tokenizer=str(tmp_path))


def test_a_text_that_is_too_long_keeps_its_response_and_a_padding_token_is_found(tmp_path: Path) -> None:
    tokenizer = deepcopy(text_tokenizer())
    tokenizer.pad_token, tokenizer.model_max_length = None, 16
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    torch.manual_seed(0)
    LlamaForSequenceClassification(AutoConfig.for_model("llama", **shape, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = Reward(ClassifierReward(path=str(tmp_path)), tokenizer=str(tmp_path))
    first, second, third = reward.rate(rollouts((PAIRS[0][0] * 9, "in 1950"), (PAIRS[0][0] * 9, "the third"), PAIRS[1]))
    assert first != second != third
