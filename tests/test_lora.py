"""Adapters: the gradient of the chain rule, what they can express, and a learner that trains nothing else."""

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from example_text import text
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from small_runs import MAX_PROMPT, MAX_RESPONSE, ON_CPU, llama
from test_learner import STAGES, VOCAB, all_rows, make_learner, published, student_config, terms_of
from test_student import ARCHITECTURES, saved_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from raykd.algorithms import GKD, KD
from raykd.collate import collate
from raykd.experiment import (
    EvaluationConfig,
    Experiment,
    LearnerConfig,
    LoRA,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
    TrackingConfig,
)
from raykd.head import Head
from raykd.rank import meeting_place
from raykd.records import Row, Totals
from raykd.run import run
from raykd.sources import Pairs
from raykd.student import Student

SETTINGS: dict[str, Any] = {"dtype": torch.float32, "vocab_size": VOCAB, "chunk": 4, "activation_checkpointing": False}
KINDS = ("llama", "gpt2", "opt projected", "gemma2")
TRAINED = LoRA(rank=3, alpha=6)
ADAM = Optimiser(eps=1e-6, weight_decay=0.1, gradient_clip=0.5)
RATES = (1e-2, 1e-2, 1e-2, 3e-3)


def loss_of(student: Student, rows: list[Row], head: Head) -> Tensor:
    fields: dict[str, Any] = {"fetch": lambda block: block, "vocab_size": VOCAB, "lay": student.lay}
    micro = collate(rows, KD(), Totals.of(rows), teacher_head=head, **fields)
    return student(micro, KD())[0]


def adapted(folder: str, config: LoRA, seed: int | None = None) -> Student:
    """A student with adapters; with ``seed``, trained ones."""
    student = Student(folder, teacher_head=all_rows()[0], lora=config, **SETTINGS)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return student


@torch.no_grad()
def merged(student: Student) -> dict[str, Tensor]:
    return {name: student.whole(name) for name in student.state()}


def dense(student: Student, folder: Path) -> Student:
    """The student that all weights are learned of, at the weights that this one sends."""
    student.model.save_pretrained(folder, state_dict=merged(student))
    return Student(str(folder), teacher_head=all_rows()[0], **SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing(tmp_path: Path, kind: str) -> None:
    folder = saved_model(tmp_path, kind, ARCHITECTURES[kind])
    head, rows = all_rows()
    plain, student = Student(folder, teacher_head=head, **SETTINGS), adapted(folder, LoRA(rank=4))
    assert torch.equal(loss_of(student, rows["rows"], head), loss_of(plain, rows["rows"], head))
    assert merged(student).keys() == plain.state().keys()
    assert all(torch.equal(tensor, plain.state()[name]) for name, tensor in merged(student).items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weights_by_the_chain_rule(tmp_path: Path, kind: str) -> None:
    head, rows = all_rows()
    student = adapted(saved_model(tmp_path / "a", kind, ARCHITECTURES[kind]), TRAINED, seed=1)
    whole = dense(student, tmp_path / "b")
    loss, expected = loss_of(student, rows["rows"], head), loss_of(whole, rows["rows"], head)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    expected.backward()
    assert student._adapters
    for name, adapter in student._adapters.items():
        slope = whole.state()[name].grad
        assert slope is not None
        slope = slope.T if kind == "gpt2" else slope  # [out, in]
        scale = TRAINED.alpha / TRAINED.rank
        torch.testing.assert_close(adapter.first.grad, scale * adapter.second.detach().T @ slope, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(adapter.second.grad, scale * slope @ adapter.first.detach().T, atol=1e-6, rtol=1e-5)
        assert adapter.second.grad is not None and adapter.second.grad.any()


def test_full_rank_expresses_any_step_of_the_weights(tmp_path: Path) -> None:
    head, rows = all_rows()
    folder = saved_model(tmp_path / "a", "llama", ARCHITECTURES["llama"])
    student, whole = adapted(folder, LoRA(rank=48, alpha=48)), Student(folder, teacher_head=head, **SETTINGS)
    (loss_of(whole, rows["rows"], head) * 100).backward()
    for name, adapter in student._adapters.items():
        step = whole.state()[name].grad
        assert step is not None
        with torch.no_grad():
            whole.state()[name].sub_(step)
            u, s, v = torch.linalg.svd(step, full_matrices=False)
            adapter.first.zero_()[: len(s)] = v
            adapter.second.zero_()[:, : len(s)] = -u * s
    for name, tensor in merged(student).items():
        torch.testing.assert_close(tensor, whole.state()[name], atol=1e-6, rtol=1e-5)
    found, expected = loss_of(student, rows["rows"], head), loss_of(whole, rows["rows"], head)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_the_adapters_of_the_named_layers_are_learned(tmp_path: Path) -> None:
    student = adapted(saved_model(tmp_path, "llama", ARCHITECTURES["llama"]), LoRA(rank=2, targets=("q_proj", "v_proj")))
    learned = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    layers = (f"model.model.layers.{layer}.self_attn.{kind}_proj.adapter" for layer in (0, 1) for kind in "qv")
    assert learned == {f"{layer}.{part}" for layer in layers for part in ("first", "second")}


def test_layers_that_do_not_exist_are_refused_with_those_that_do(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "gpt2", ARCHITECTURES["gpt2"])
    expected = "gpt2 has no linear layers named lm_head, q_proj that can be adapted; it has c_attn, c_fc, c_proj"
    with pytest.raises(ValueError, match=expected):
        adapted(folder, LoRA(rank=2, targets=("c_attn", "q_proj", "lm_head")))
    with pytest.raises(ValidationError, match="alpha"):
        LoRA(rank=2, alpha=0)


@pytest.mark.stack
@pytest.mark.timeout(600)
def test_engines_write_with_the_merged_weights(teacher: Path, tmp_path: Path) -> None:
    """A whole run: what the learner finds likely is what the engine sampled from, also after steps of the adapters."""
    experiment = Experiment(
        name="adapters",
        teacher=Model(path=str(teacher)),
        student=Model(path=str(text().tokenizer), scratch=llama(32)),
        data=Pairs(path=str(text().pairs)),
        stages=(Stage(algorithm=GKD(), steps=4, batch_size=16, optimiser=Optimiser(learning_rate=2e-2)),),
        max_prompt=MAX_PROMPT,
        max_response=MAX_RESPONSE,
        rollout=RolloutConfig(engine=ON_CPU),
        teachers=TeacherConfig(dtype="float32", engine=ON_CPU),
        learner=LearnerConfig(dtype="float32", zero_stage=3, lora=LoRA(rank=8, alpha=16)),
        evaluation=EvaluationConfig(prompts=0),
        tracking=TrackingConfig(wandb=False),
        runs=tmp_path / "runs",
    )
    result = run(experiment, console=Console(quiet=True))
    steps = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert max(line["logprob_mismatch"] for line in steps) < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (result.folder / "student_init", result.student))
    moved = {name for name, tensor in after.items() if (tensor - before[name]).abs().max() > 1e-2}
    assert before.keys() == after.keys() and moved == {name for name in after if "_proj" in name}


# --- on DeepSpeed -------------------------------------------------------------------------------------------------------------


def plain_loop(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of AdamW on the adapters alone, without DeepSpeed, all rows at once."""
    head, rows = all_rows()
    student = Student(str(folder / "student-True"), teacher_head=head, lora=TRAINED, **SETTINGS)
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(learned, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay)
    losses = []
    for rate in RATES:
        adam.param_groups[0]["lr"] = rate
        loss = loss_of(student, rows["rows"], head)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, ADAM.gradient_clip)
        adam.step()
        losses.append(loss.item())
    return losses, merged(student)


def train(rank: int, ranks: int, config: LearnerConfig, port: int, folder: Path, out: Path) -> dict[str, Any]:
    head, rows = all_rows()
    learner = make_learner(rank, port, folder, config, True, head)

    def step(rate: float) -> float:
        return learner.step(terms_of(KD(), rows, 0, rank, ranks)[:1], rate)["loss"]

    learner.begin(ADAM)
    found: dict[str, Any] = {"losses": [step(rate) for rate in RATES], "published": published(learner)}
    learner.save_student(out / "student")
    learner.save(out / "checkpoint")
    found["first"] = [step(1e-2) for _ in range(2)]
    learner.restore(out / "checkpoint")
    found["second"] = [step(1e-2) for _ in range(2)]
    moments = learner._engine.basic_optimizer.state.values()
    found["moments"] = sum(value.numel() for state in moments for value in state.values())
    learner.close()
    learner = make_learner(rank, port, folder, config, True, head)
    learner.restore(out / "checkpoint")
    found["fresh"] = [step(1e-2) for _ in range(2)]
    learner.close()
    return found


CASES: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero_stage": stage} for stage in STAGES},
    "checkpointing": {"activation_checkpointing": True},
    "offload": {"zero_stage": 2, "offload_optimiser": True},
}


def run_rank(rank: int, ranks: int, port: int, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        found = {}
        for name, fields in CASES.items():
            config = LearnerConfig(ranks=ranks, dtype="float32", micro_batch=2, chunk=3, lora=TRAINED, **fields)
            found[name] = train(rank, ranks, config, port, folder, folder / f"{ranks} {name}")
        results.put((rank, pickle.dumps(found)))
    except BaseException as error:
        import traceback

        results.put((rank, f"{error}\n{traceback.format_exc()}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(student_config(tied=True)).save_pretrained(folder / "student-True")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request: pytest.FixtureRequest, folder: Path) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    results, place = context.Queue(), meeting_place("127.0.0.1")
    for rank in range(request.param):
        context.Process(target=run_rank, args=(rank, request.param, place.port, folder, results), daemon=True).start()
    found = dict(results.get(timeout=240) for _ in range(request.param))
    for rank, result in found.items():
        assert isinstance(result, bytes), f"rank {rank}: {result}"
    return {rank: pickle.loads(result) for rank, result in found.items()}


@pytest.mark.stack
@pytest.mark.parametrize("case", CASES)
def test_every_way_of_running_follows_a_plain_loop(runs: dict[int, Any], folder: Path, case: str) -> None:
    expected, weights = plain_loop(folder)
    losses = [sum(shares) for shares in zip(*(found[case]["losses"] for found in runs.values()), strict=True)]
    assert losses == pytest.approx(expected, abs=1e-5)
    sent = runs[0][case]["published"]
    saved = AutoModelForCausalLM.from_pretrained(folder / f"{len(runs)} {case}" / "student")
    assert sent.keys() == {name for name, _ in saved.named_parameters()}
    for name, tensor in saved.named_parameters():
        assert torch.equal(sent[name], tensor), name
        torch.testing.assert_close(tensor.detach(), weights[name], atol=1e-5, rtol=1e-4)
    initial = AutoModelForCausalLM.from_pretrained(folder / "student-True")
    changed = {name for name, tensor in initial.named_parameters() if not torch.equal(sent[name], tensor)}
    assert changed == {name for name, _ in initial.named_parameters() if "_proj" in name}


@pytest.mark.stack
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_hold_the_adapters_and_no_body_and_go_on_as_before(runs: dict[int, Any], folder: Path, case: str) -> None:
    for found in runs.values():
        assert found[case]["second"] == found[case]["first"] == found[case]["fresh"]
    adapters = adapted(str(folder / "student-True"), TRAINED)._adapters.values()
    learned = sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())
    assert all(found[case]["moments"] < 2.1 * learned for found in runs.values())
    checkpoint = folder / f"{len(runs)} {case}" / "checkpoint" / "checkpoint-0"
    assert json.loads((checkpoint / "learner.json").read_text())["lora"] == TRAINED.model_dump(mode="json")
    written = {name for path in checkpoint.glob("*.safetensors") for name in load_file(path)}
    assert written and all("adapter" in name for name in written)
