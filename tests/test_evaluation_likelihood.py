"""Losses, divergences and label words against the plain way: all logits at once, from Hugging Face's own forward pass."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from raykd.evaluation.exposure_bias import excess_error
from raykd.evaluation.likelihood import Scorer, Texts, kl_per_token, label_probabilities, score
from raykd.evaluation.suites import LabelQuestion
from raykd.experiment import TeacherConfig
from raykd.records import Prompt, Rollout, Source

VOCABULARY = 29
CONFIG = TeacherConfig(dtype="float32", chunk=3, batch_tokens=40)


def model(folder: Path, seed: int) -> str:
    """A small random Llama with three rows more than its vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / str(seed))
    return str(folder / str(seed))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return model(folder, 1), model(folder, 2)


def response(*lengths: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(sum(lengths))

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())

    return [
        Rollout(prompt_id=str(n), sample=0, prompt_tokens=tokens(4), tokens=tokens(length), source=Source.STUDENT)
        for n, length in enumerate(lengths)
    ]


@torch.no_grad()
def dense(folder: str, rollout: Rollout) -> torch.Tensor:
    """log-probs over the true vocabulary at every response token; [T, V] float64."""
    ids = torch.tensor([rollout.prompt_tokens + rollout.tokens])
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    return logits[len(rollout.prompt_tokens) - 1 : -1, :VOCABULARY].double().log_softmax(-1)


def test_kl_per_token_is_that_of_the_whole_distributions(pair: tuple[str, str]):
    rollouts = response(5, 1, 9)
    student, teacher = (Scorer(folder, CONFIG, VOCABULARY) for folder in pair)
    forward, reverse = kl_per_token(student, teacher, rollouts)
    for rollout, of_teacher, of_student in zip(rollouts, forward, reverse, strict=True):
        q, p = dense(pair[0], rollout), dense(pair[1], rollout)
        torch.testing.assert_close(of_teacher.double(), (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of_student.double(), (q.exp() * (q - p)).sum(-1), atol=1e-5, rtol=1e-5)


def test_a_suite_is_scored_token_by_token_and_seed_by_seed(pair: tuple[str, str]):
    references, own, teachers = response(2, 7), [response(4, 3), response(5, 1)], [response(6, 5), response(2, 7)]
    texts = {"suite": Texts(references=references, own=own, teachers=teachers)}
    found = score(*pair, CONFIG, VOCABULARY, texts, {})["suite"]

    def divergence(rollouts: list[Rollout], forward: bool) -> list[torch.Tensor]:
        pairs = [(dense(pair[1], rollout), dense(pair[0], rollout)) for rollout in rollouts]
        ordered = pairs if forward else [(q, p) for p, q in pairs]
        return [(a.exp() * (a - b)).sum(-1) for a, b in ordered]

    chosen = [dense(pair[0], rollout).gather(-1, torch.tensor(rollout.tokens)[:, None]) for rollout in references]
    curves = [excess_error(divergence(a, True), divergence(b, True)) for a, b in zip(own, teachers, strict=True)]
    together = excess_error(divergence(own[0] + own[1], True), divergence(teachers[0] + teachers[1], True))
    assert found.excess_error == pytest.approx(together.tolist(), abs=1e-2) and len(together) == 5
    expected = {
        "test_loss": [-float(torch.cat(chosen).mean())],
        "forward_kl": [float(torch.cat(divergence(references, True)).mean())],
        "reverse_kl": [float(torch.cat(divergence(seed, False)).mean()) for seed in own],
        "excess_error": [float(curve[-1]) for curve in curves],
    }
    assert found.measures.keys() == expected.keys()
    for name, values in expected.items():
        assert list(found.measures[name]) == pytest.approx(values, rel=1e-4), name


def test_a_model_is_no_distance_from_itself(pair: tuple[str, str]):
    rollouts = response(3, 4)
    found = score(pair[0], pair[0], CONFIG, VOCABULARY, {"s": Texts(rollouts, [rollouts], [rollouts])}, {})["s"]
    assert found.measures["forward_kl"] == found.measures["reverse_kl"] == (0,)
    assert found.measures["excess_error"] == (0,) and found.excess_error == (0,) * 4


def test_without_a_teacher_there_is_the_loss_alone(pair: tuple[str, str]):
    found = score(pair[0], None, CONFIG, VOCABULARY, {"s": Texts(response(3), [response(3)], [])}, {})["s"]
    assert set(found.measures) == {"test_loss"} and found.excess_error == ()


def test_label_probabilities_are_the_words_likelihoods_without_eos(pair: tuple[str, str]):
    eos, words = 0, ((5,), (7, 8, 9))
    asked = [
        LabelQuestion(row, tuple(Prompt(id=str(row), tokens=prompt, response=(*word, eos)) for word in words), label)
        for row, prompt, label in ((0, (1, 2, 3), 0), (1, (4, 4), 1))
    ]
    found = label_probabilities(Scorer(pair[0], CONFIG, VOCABULARY), asked)
    for row, question in enumerate(asked):
        likelihoods = []
        for prompt, word in zip(question.prompts, words, strict=True):
            logprobs = dense(pair[0], Rollout.reference(prompt))
            likelihoods.append(math.exp(sum(float(logprobs[t, token]) for t, token in enumerate(word))))
        assert found[row].tolist() == pytest.approx([value / sum(likelihoods) for value in likelihoods], rel=1e-4)
    measures = score(pair[0], None, CONFIG, VOCABULARY, {}, {"labels": asked})["labels"].measures
    right = [bool(found[row].argmax() == question.label) for row, question in enumerate(asked)]
    assert measures["accuracy"] == (50 * sum(right),) and 0 <= measures["ece"][0] <= 1
