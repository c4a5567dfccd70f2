"""The teacher on vLLM's pooling engine beside the one on Hugging Face: the same states, heads and scores."""

import json
import math
import multiprocessing
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rollout_stack import STORIES, STORIES_EOS, chosen_logprobs, inspect_here, new_engine, perturbed, publish, wait
from safetensors.torch import load_file, save_file
from small_runs import MAX_PROMPT, MAX_RESPONSE, ON_CPU
from test_student import ARCHITECTURES, LLAMA_LIKE, VOCAB, saved_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from raykd.algorithms import GKD, KD, MiniLLM
from raykd.algorithms.base import Needs
from raykd.experiment import (
    EngineConfig,
    EvaluationConfig,
    Experiment,
    LearnerConfig,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
    TrackingConfig,
)
from raykd.records import Rollout, Scores, Source
from raykd.run import run
from raykd.sources import Pairs
from raykd.teacher import Teacher
from raykd.teacher.heads import head_in_checkpoint
from raykd.teacher.pooled import PooledStates, refuse_overflowing

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600), pytest.mark.usefixtures("data")]

STORIES_VOCAB = 512


def teachers(model: str, vocab_size: int, max_length: int = 64, **fields: Any) -> tuple[Teacher, Teacher]:
    """The same one, on Hugging Face and on vLLM."""
    inspect_here()
    config = TeacherConfig(dtype="float32", engine=EngineConfig(cpu_cache_gib=0.1), **fields)
    sizes = {"vocab_size": vocab_size, "max_length": max_length}
    return Teacher(model, config, **sizes), Teacher(model, config.model_copy(update={"backend": "vllm"}), **sizes)


@cache
def of_stories() -> tuple[Teacher, Teacher]:
    return teachers(STORIES, STORIES_VOCAB, max_length=256)


def rollouts(lengths: list[tuple[int, int]], vocab_size: int) -> list[Rollout]:
    """Of (prompt, response) lengths; prompts of the same length are the same."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab_size, (count,), generator=generator).tolist())

    prompts = {length: ids(length) for length, _ in lengths}
    texts = [(prompts[prompt], ids(response)) for prompt, response in lengths]
    return [Rollout(prompt_id="a", sample=0, prompt_tokens=p, tokens=r, source=Source.DATASET) for p, r in texts]


def agree(found: Scores, expected: Scores, of: list[Rollout], atol: float = 1e-5) -> None:
    """At every token that is predicted."""
    assert found.offsets == expected.offsets
    for index, rollout in enumerate(of):
        first, mine, theirs = 0 if rollout.prompt_tokens else 1, found.row(index), expected.row(index)
        for name in ("hidden", "logprobs", "log_normaliser"):
            pair = (getattr(scores, name)[first:] for scores in (mine, theirs))
            torch.testing.assert_close(*pair, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# Prompts within a block of the KV cache, of two whole blocks and past them; shared, alone, missing; empty responses.
LENGTHS = [(33, 20), (33, 28), (32, 25), (32, 9), (0, 9), (0, 1), (1, 2), (33, 0), (5, 50)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_states_head_and_scores_are_those_of_hugging_face(tmp_path: Path, kind: str) -> None:
    folder = saved_model(tmp_path, kind, ARCHITECTURES[kind])
    plain, pooled = teachers(folder, VOCAB - 1)  # the last row of the vocabulary is padding
    mine, theirs = pooled.head(), plain.head()
    assert torch.equal(mine.weight, theirs.weight)
    assert (mine.scale, mine.softcap, mine.bias is None) == (theirs.scale, theirs.softcap, theirs.bias is None)
    given = rollouts(LENGTHS, VOCAB - 1)
    agree(pooled.score(given, Needs.BOTH), plain.score(given, Needs.BOTH), given)


def test_scores_stay_the_same_whatever_the_cache_holds() -> None:
    plain, pooled = of_stories()
    given = rollouts([(70, 20), (70, 30), (64, 33), (64, 60), (64, 60), (5, 100)], STORIES_VOCAB)
    given.append(
        Rollout(
            **{name: getattr(given[0], name) for name in ("prompt_id", "prompt_tokens", "source")},
            sample=1,
            tokens=given[1].tokens[:-1],
        )
    )
    expected = plain.score(given, Needs.BOTH)
    for part in (given, given[3:], given):  # everything anew; parts again; everything from the cache
        found, same = pooled.score(part, Needs.BOTH), plain.score(part, Needs.BOTH)
        agree(found, same, part)
    agree(pooled.score(given, Needs.BOTH), expected, given)


def test_the_thread_that_started_the_engine_steps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    class Engine:
        """Notes which thread starts and asks it, and never has anything to read."""

        def __init__(self, *_: Any) -> None:
            threads.append(threading.current_thread().name)

        def reset_prefix_cache(self) -> None:
            threads.append(threading.current_thread().name)

        def has_unfinished_requests(self) -> bool:
            threads.append(threading.current_thread().name)
            return False

    monkeypatch.setattr("raykd.teacher.pooled.start", Engine)
    states = PooledStates(STORIES, TeacherConfig(backend="vllm", dtype="float32"), 64)
    states.of([])
    states.answer([], 1, (STORIES_EOS,), STORIES_VOCAB)
    assert len(threads) > 2 and {*threads} == {threads[0]} != {threading.current_thread().name}


def test_a_prompt_of_several_responses_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pooled = of_stories()
    states: Any = pooled._states
    given = rollouts([(length, response) for length in (70, 64) for response in (20, 30, 40, 50)], STORIES_VOCAB)
    read: list[int] = []
    ends = states._ends

    def watched(texts: Any, *, cached: bool) -> dict[Any, Tensor]:
        found = ends(texts, cached=cached)
        read.append(sum(map(len, found.values())))
        return found

    monkeypatch.setattr(states, "_ends", watched)
    agree(pooled.score(given, Needs.BOTH), plain.score(given, Needs.BOTH), given)
    whole = sum(70 + 64 + 2 * (response - 1) for response in (20, 30, 40, 50))
    assert read == [whole - 6 * 64, 0], "three of four prompts are taken from the cache, in whole blocks of 32"


def test_texts_longer_than_a_step_takes_are_read_in_pieces() -> None:
    plain, pooled = teachers(STORIES, STORIES_VOCAB, max_length=256, batch_tokens=48)
    given = rollouts([(70, 60), (70, 100), (3, 150)], STORIES_VOCAB)
    agree(pooled.score(given, Needs.BOTH), plain.score(given, Needs.BOTH), given)


def score_in_two(model: str, results: Any) -> None:
    given = rollouts(LENGTHS, STORIES_VOCAB)
    engine = EngineConfig(cpu_cache_gib=0.1, tensor_parallel=2)
    config = TeacherConfig(dtype="float32", backend="vllm", engine=engine)
    found = Teacher(model, config, vocab_size=STORIES_VOCAB, max_length=64).score(given, Needs.BOTH)
    results.put(
        (
            found.offsets,
            *(values.numpy() for values in (found.hidden, found.logprobs, found.log_normaliser) if values is not None),
        )
    )


def test_two_tensor_parallel_processes_compute_the_same_states() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=score_in_two, args=(STORIES, results))
    process.start()
    offsets, *values = results.get(timeout=300)
    process.join(timeout=60)
    hidden, logprobs, log_normaliser = map(torch.from_numpy, values)
    found = Scores(offsets=offsets, hidden=hidden, logprobs=logprobs, log_normaliser=log_normaliser)
    given = rollouts(LENGTHS, STORIES_VOCAB)
    agree(found, of_stories()[0].score(given, Needs.BOTH), given)


MORE_THAN_COPIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},  # first: vLLM makes its groups for it
    "phi": {"num_key_value_heads": 4},
}
"""Models whose updates are not mere copies: experts, which vLLM lays out anew on CPU, and a bias of the head, for which it makes
a new tensor each time. The second it runs by transformers' own classes, which it changes."""


def write_beside_a_teacher(folder: Path, results: Any) -> None:
    given = rollouts([(3, 9), (5, 4)], VOCAB)
    for kind, fields in MORE_THAN_COPIES.items():
        model = saved_model(folder / kind, kind, {**LLAMA_LIKE, **fields, "initializer_range": 0.3})
        changed = [perturbed(AutoModelForCausalLM.from_pretrained(model), seed) for seed in (1, 2)]
        for each in changed:
            decoder: Any = each.get_decoder()
            decoder.do_not_compile = True
            for parameter in each.parameters():
                parameter.data += 0.1 * (parameter.ndim == 1)  # biases are zero at first
        teacher = Teacher(model, TeacherConfig(dtype="float32"), vocab_size=VOCAB)
        before = teacher.score(given, Needs.BOTH)
        engine = new_engine(model, vocab_size=VOCAB, max_length=32)
        agree(teacher.score(given, Needs.BOTH), before, given)
        for version, now in enumerate(changed, start=1):
            wait(engine.load(publish(now, version)))
            written = wait(engine.complete([5, 6], 20, seed=version))
            expected = chosen_logprobs(now, [5, 6, *written.tokens], 2)
            torch.testing.assert_close(torch.tensor(written.logprobs), expected, atol=1e-4, rtol=0)
    results.put("done")


def test_an_engine_beside_a_teacher_takes_every_update_and_leaves_the_teacher_as_it_was(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=write_beside_a_teacher, args=(tmp_path, results))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0 and results.get(timeout=10) == "done"


def eight_bits(folder: Path) -> PreTrainedModel:
    """A Llama whose linear layers, not its head, become 8-bit integers on disk, as compressed-tensors writes them; returned is
    the same computed in float32: weights of one scale a row, activations rounded to 255 steps between their extremes."""
    saved_model(folder, "llama", ARCHITECTURES["llama"] | {"hidden_size": 64, "intermediate_size": 128})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            assert isinstance(layer, nn.Linear)
            scale = layer.weight.detach().abs().amax(-1, keepdim=True) / 127
            whole = (layer.weight.detach() / scale).round()
            stored |= {f"{name}.weight": whole.to(torch.int8), f"{name}.weight_scale": scale}
            layer.weight.data = whole * scale
            layer.register_forward_pre_hook(round_activations)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    quantised = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantised | {"config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def round_activations(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 255
    zero = (-128 - low / step).round()
    return ((((x / step).round() + zero).clamp(-128, 127) - zero) * step,)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="oneDNN's 8-bit products overflow on this processor")
def test_a_quantised_teacher_is_scored_with_its_own_head(tmp_path: Path) -> None:
    same = eight_bits(tmp_path)
    given = [rollout for rollout in rollouts(LENGTHS, VOCAB) if rollout.prompt_tokens]
    config = TeacherConfig(dtype="float32", payload="hidden", engine=EngineConfig(cpu_cache_gib=0.1))
    expected = Teacher(same, config, vocab_size=VOCAB).score(given, Needs.BOTH)
    teacher = Teacher(str(tmp_path), config.model_copy(update={"backend": "vllm"}), vocab_size=VOCAB, max_length=64)
    found = teacher.score(given, Needs.BOTH)
    assert found.hidden is not None and expected.hidden is not None
    # An activation at the border of two steps may be rounded either way.
    error = (found.hidden - expected.hidden).abs()
    assert (error < 1e-5).float().mean() > 0.9 and error.max() < 0.02
    torch.testing.assert_close(teacher.head()(found.hidden).logsumexp(-1), found.log_normaliser, atol=1e-5, rtol=1e-5)


def test_products_that_would_overflow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eight_bits(tmp_path)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match=r"8-bit integers, whose products overflow .* set teachers.backend to transformers"):
        refuse_overflowing(str(tmp_path))
    refuse_overflowing(STORIES)


def test_a_head_that_is_quantised_or_missing_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "llama", ARCHITECTURES["llama"])
    stored = load_file(tmp_path / "model.safetensors")
    eighth = {"lm_head.weight": stored["lm_head.weight"].to(torch.int8)}
    save_file(stored | eighth, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"its head is quantised \(lm_head.weight is torch.int8\)"):
        head_in_checkpoint(folder, torch.float32)
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor of its checkpoint is its head \(lm_head.weight\)"):
        head_in_checkpoint(folder, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        head_in_checkpoint(folder, torch.float32)


def test_answers_follow_the_teacher_token_by_token(tmp_path: Path) -> None:
    """A law that leaves no choice: both back ends write the same."""
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    model.get_parameter("model.norm.weight").data *= 1000
    model.save_pretrained(tmp_path)
    plain, pooled = teachers(str(tmp_path), STORIES_VOCAB, max_length=256)
    prompts = [rollout.prompt_tokens for rollout in rollouts([(40, 0), (3, 0), (70, 0)], STORIES_VOCAB)]
    expected = plain.answer(prompts, 40, (STORIES_EOS,))
    assert pooled.answer(prompts, 40, (STORIES_EOS,)) == expected
    assert all(len(answer) == 40 or answer[-1] == STORIES_EOS for answer in expected)
    ended = expected[0][5]
    assert [answer[-1] for answer in pooled.answer(prompts[:1], 40, (ended,))] == [ended]


def test_a_run_with_an_engine_that_scores_beside_the_one_that_writes(teacher: Path, tmp_path: Path) -> None:
    """The student begins as the teacher itself: on the first step the learner finds no divergence, to rounding."""
    slow = Optimiser(learning_rate=1e-3)
    experiment = Experiment(
        name="pooled",
        teacher=Model(path=str(teacher)),
        student=Model(path=str(teacher)),
        data=Pairs(path=str(pairs())),
        stages=(
            Stage(algorithm=KD(), steps=1, batch_size=16, optimiser=slow),
            Stage(algorithm=GKD(), steps=2, batch_size=16, samples_per_prompt=2, optimiser=slow),
            Stage(algorithm=MiniLLM(rollouts=16, epochs=1, text_coefficient=0), steps=2, batch_size=16, optimiser=slow),
        ),
        max_prompt=MAX_PROMPT,
        max_response=MAX_RESPONSE,
        rollout=RolloutConfig(engine=ON_CPU),
        teachers=TeacherConfig(backend="vllm", dtype="float32", engine=ON_CPU),
        learner=LearnerConfig(dtype="float32"),
        evaluation=EvaluationConfig(prompts=8, samples=2),
        tracking=TrackingConfig(wandb=False),
        runs=tmp_path / "runs",
    )
    result = run(experiment, console=Console(quiet=True))
    assert result.before["forward_kl"] == pytest.approx(0, abs=1e-5) and result.before["reverse_kl"] == pytest.approx(0, abs=1e-5)
    steps = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps[0]["loss"] == pytest.approx(0, abs=1e-5)
    assert all(math.isfinite(value) for line in steps for value in line.values())
    assert [line["skipped"] for line in steps] == [0] * 5
    mixed = next(line for line in steps if "importance_weight" in line)
    assert mixed["importance_weight"] == pytest.approx(1, abs=0.1)
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert samples and json.dumps(samples).count('"teacher"') == 2


def pairs() -> Path:
    from example_text import text

    return text().pairs
