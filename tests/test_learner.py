"""The learner on real DeepSpeed: every world size and ZeRO stage follows a plain PyTorch loop with dense logits."""

import json
import math
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raykd.algorithms import KD, SFT, MiniLLM
from raykd.algorithms.base import Algorithm
from raykd.collate import LossTerm, deal
from raykd.experiment import LearnerConfig, Optimiser
from raykd.head import Head
from raykd.logprobs import mixture_logprobs
from raykd.rank import meeting_place
from raykd.records import Batch, Rollout, Row, Scores, Source, Totals
from raykd.weights import unpack

ROOT = str(Path(__file__).parents[1])
VOCAB, PADDED_VOCAB, TEACHER_WIDTH = 61, 64, 48
OPTIMISER = Optimiser(learning_rate=3e-3, eps=1e-6, weight_decay=0.1, gradient_clip=0.5)
LEARNING_RATES = (1e-3, 3e-3, 3e-3, 2e-3)
ALGORITHMS: tuple[Algorithm, ...] = (SFT(), KD(), MiniLLM())
ZeroStage = Literal[0, 1, 2, 3]
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)
OTHER_STAGES: tuple[tuple[int, ZeroStage], ...] = ((0, 3), (3, 1), (1, 2), (2, 0))
"""Who writes a checkpoint, and who reads it."""


def student_config(tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=PADDED_VOCAB,
        tie_word_embeddings=tied,
        attention_dropout=0.3,
    )


def teacher_head(generator: torch.Generator) -> Head:
    return Head(weight=torch.randn(PADDED_VOCAB, TEACHER_WIDTH, generator=generator) / 4).cut(VOCAB)


def scores_of(rollouts: list[Rollout], head: Head, generator: torch.Generator) -> Scores:
    tokens = torch.tensor([token for rollout in rollouts for token in rollout.tokens])
    hidden = torch.randn(len(tokens), TEACHER_WIDTH, generator=generator)
    logits = head(hidden)
    offsets = torch.tensor([0, *(len(rollout.tokens) for rollout in rollouts)]).cumsum(0).tolist()
    normaliser = logits.logsumexp(-1)
    chosen = logits[torch.arange(len(tokens)), tokens] - normaliser
    return Scores(offsets=tuple(offsets), log_normaliser=normaliser, logprobs=chosen, hidden=hidden)


def make_rows(lengths: list[tuple[int, int]], head: Head, seed: int) -> list[Row]:
    """Teacher-mixed rollouts of (prompt, response) lengths, scored in one block."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=generator).tolist())

    rollouts = [
        Rollout(
            prompt_id=f"made:{index}",
            sample=0,
            prompt_tokens=ids(prompt),
            tokens=ids(response),
            source=Source.MIXED,
            teacher_share=0.2,
            student_logprobs=tuple((-4 * torch.rand(response, generator=generator)).tolist()),
        )
        for index, (prompt, response) in enumerate(lengths)
    ]
    scores = scores_of(rollouts, head, generator)
    return [
        Row(rollout=rollout, scores=scores, index=index, teacher_logprobs=tuple(scores.row(index).logprobs.tolist()))
        for index, rollout in enumerate(rollouts)
    ]


def all_rows() -> tuple[Head, dict[str, list[Row]]]:
    """Five rows do not divide by two ranks, one response is empty; one text has no prompt; one step has a single row."""
    head = teacher_head(torch.Generator().manual_seed(0))
    return head, {
        "rows": make_rows([(3, 7), (5, 2), (1, 9), (4, 0), (2, 4)], head, seed=1),
        "text": make_rows([(0, 8), (0, 3)], head, seed=2),
        "single": make_rows([(3, 6)], head, seed=3),
    }


def terms_of(algorithm: Algorithm, rows: dict[str, list[Row]], step: int, rank: int, ranks: int) -> list[LossTerm]:
    """The terms of one step for one rank: beside the algorithm, plain text at weight 0.3; the last step has a single row."""
    main = rows["single"] if step == 3 else rows["rows"]
    return [
        LossTerm(algorithm=algorithm, rows=deal(main, ranks)[rank], totals=Totals.of(main)),
        LossTerm(algorithm=SFT(), rows=deal(rows["text"], ranks)[rank], totals=Totals.of(rows["text"]), weight=0.3),
    ]


# --- the oracle: one row at a time, dense logits, plain AdamW -----------------------------------------------------------------


def oracle_loss(model: torch.nn.Module, row: Row, algorithm: Algorithm, totals: Totals, head: Head) -> Tensor:
    prompt, response = row.rollout.prompt_tokens, row.rollout.tokens
    first = 0 if prompt else 1
    if len(response) <= first:
        return torch.zeros(())
    logits = model(torch.tensor([prompt + response])).logits[0, :, :VOCAB]
    student = logits[len(prompt) - 1 + first : -1].log_softmax(-1)
    scores, tokens = row.scores.row(row.index), torch.tensor(response)
    teacher = head(scores.hidden[first:]).log_softmax(-1) if algorithm.needs.distribution else None
    mask = torch.arange(len(response))[None] >= first
    old = torch.tensor(row.rollout.student_logprobs)[None] * mask
    own = scores.logprobs[None] * mask
    behaviour = mixture_logprobs(old, own, row.rollout.teacher_share) * mask
    batch = Batch(
        tokens=tokens[None] * mask,
        mask=mask,
        totals=totals,
        student_logprobs=old,
        teacher_logprobs=own,
        behaviour_logprobs=behaviour,
        by_student=torch.tensor([True]),
        rewards=torch.zeros(1),
    )
    given = {name: values[0, first:] for name, values in algorithm.per_sequence(batch).items()}
    values = algorithm.per_token(student, teacher, tokens[first:], given)
    return (values["loss"] * algorithm.token_weights(batch)[0, first:]).sum()


@cache
def oracle(folder: Path, tied: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of four steps of each algorithm in turn, and the final weights."""
    from transformers import AutoModelForCausalLM

    head, rows = all_rows()
    model = AutoModelForCausalLM.from_pretrained(folder / f"student-{tied}").eval()
    losses = []
    for algorithm in ALGORITHMS:
        adam = torch.optim.AdamW(
            model.parameters(), betas=OPTIMISER.betas, eps=OPTIMISER.eps, weight_decay=OPTIMISER.weight_decay
        )
        for step, learning_rate in enumerate(LEARNING_RATES):
            adam.param_groups[0]["lr"] = learning_rate
            terms = terms_of(algorithm, rows, step, rank=0, ranks=1)
            losses_of_rows = [t.weight * oracle_loss(model, row, t.algorithm, t.totals, head) for t in terms for row in t.rows]
            loss = torch.stack(losses_of_rows).sum()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMISER.gradient_clip)
            adam.step()
            losses.append(float(loss.detach()))
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}


# --- one rank, in a process of its own ----------------------------------------------------------------------------------------


def run_rank(rank: int, ranks: int, port: int, folder: Path, results: Any) -> None:
    """Every case of one rank, one after the other: importing DeepSpeed is most of a test's time."""
    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    try:
        for stage in STAGES:
            for tied in (False, True):
                found[stage, tied] = train_case(rank, ranks, stage, tied, port, folder)
        found["other stages"] = {
            (written, read): other_stage_case(rank, ranks, written, read, port, folder) for written, read in OTHER_STAGES
        }
        if ranks == 1:
            found["bfloat16"] = {
                (stage, offload): bfloat16_case(stage, offload, port, folder) for stage in STAGES for offload in (False, True)
            }
            found["wrong head"] = wrong_head_case(port, folder)
        found["experts"] = {stage: experts_case(rank, ranks, stage, port, folder) for stage in (0, 3)}
        results.put((rank, pickle.dumps(found)))
    except BaseException as error:
        import traceback

        results.put((rank, f"{error}\n{traceback.format_exc()}"))


def make_learner(rank: int, port: int, folder: Path, config: LearnerConfig, tied: bool, head: Head) -> Any:
    from raykd.learner import Learner

    student = str(folder / f"student-{tied}")
    return Learner(student, config=config, rank=rank, address=("127.0.0.1", port), vocab_size=VOCAB, teacher_head=head)


def train_case(rank: int, ranks: int, stage: ZeroStage, tied: bool, port: int, folder: Path) -> dict[str, Any]:
    head, rows = all_rows()
    savings: dict[str, Any] = {"activation_checkpointing": tied, "offload_optimiser": stage >= 2 and not tied}
    config = LearnerConfig(ranks=ranks, zero_stage=stage, dtype="float32", micro_batch=2, chunk=3, **savings)
    learner = make_learner(rank, port, folder, config, tied, head)
    found: dict[str, Any] = {"metrics": []}
    for algorithm in ALGORITHMS:
        learner.begin(OPTIMISER)
        for step, learning_rate in enumerate(LEARNING_RATES):
            terms = terms_of(algorithm, rows, step, rank, ranks)
            found["metrics"].append({**learner.step(terms, learning_rate), "evaluated": learner.evaluate(terms)["loss"]})
    out = folder / f"{ranks}-{stage}-{tied}"
    found["teacher"] = held_of_teacher(learner)
    found["published"] = published(learner)
    learner.save_student(out / "student")
    found["absurd"] = absurd_case(learner, rows, rank, ranks)
    found["skipped"], found["before"], found["after"] = nan_case(learner, rows, rank, ranks)

    learner.save(out / "checkpoints")
    learner.save(out / "checkpoints")
    found["saved"] = published(learner)

    found["first"] = next_losses(learner, rows, rank, ranks)
    learner.restore(out / "checkpoints")
    found["folders"] = sorted(path.name for path in (out / "checkpoints").glob("*") if path.is_dir())
    found["second"] = next_losses(learner, rows, rank, ranks)
    learner.close()
    if tied:
        learner = make_learner(rank, port, folder, config, tied, head)
        learner.restore(out / "checkpoints")
        found["fresh"] = next_losses(learner, rows, rank, ranks)
        learner.close()
    return found


def next_losses(learner: Any, rows: dict[str, list[Row]], rank: int, ranks: int) -> list[float]:
    return [learner.step(terms_of(MiniLLM(), rows, step, rank, ranks), 1e-3)["loss"] for step in range(3)]


def other_stage_case(rank: int, ranks: int, written: int, read: ZeroStage, port: int, folder: Path) -> tuple[Any, list[float]]:
    """A learner that goes on from what one of another ZeRO stage has written: its weights, and its next losses."""
    head, rows = all_rows()
    config = LearnerConfig(ranks=ranks, zero_stage=read, dtype="float32", micro_batch=2, offload_optimiser=read == 2)
    learner = make_learner(rank, port, folder, config, True, head)
    learner.restore(folder / f"{ranks}-{written}-True" / "checkpoints")
    weights = published(learner)
    losses = next_losses(learner, rows, rank, ranks)
    learner.close()
    return weights, losses


def published(learner: Any) -> dict[str, Tensor]:
    update = learner.publish(version=1)
    return {} if update is None else {name: tensor.clone() for bucket in update.buckets for name, tensor in unpack(bucket)}


def held_of_teacher(learner: Any) -> tuple[int, int]:
    """Numbers of the teacher's head that this rank holds between the steps, and those of the whole."""
    weight = learner._student.output.teacher_weight
    return (weight.ds_tensor.numel(), weight.ds_numel) if hasattr(weight, "ds_tensor") else (-1, -1)


def nan_case(learner: Any, rows: dict[str, list[Row]], rank: int, ranks: int) -> tuple[float | None, Any, Any]:
    """One row of one rank is not a number."""
    from dataclasses import replace

    row = rows["rows"][0]
    spoiled = replace(row, rollout=replace(row.rollout, student_logprobs=(math.nan,) * len(row.rollout.tokens)))
    terms = terms_of(MiniLLM(), {**rows, "rows": [spoiled, *rows["rows"][1:]]}, 0, rank, ranks)
    before = published(learner)
    return learner.step(terms, 1e-2).get("skipped"), before, published(learner)


def absurd_case(learner: Any, rows: dict[str, list[Row]], rank: int, ranks: int) -> dict[str, Any]:
    """Gradient norms beyond the limit; the third in a row ends it. Weights and moments are those of before."""
    terms = terms_of(KD(), rows, 0, rank, ranks)
    learner.begin(OPTIMISER.model_copy(update={"gradient_limit": 1e-3, "max_skipped": 3}))
    before = published(learner)
    found: dict[str, Any] = {"steps": [learner.step(terms, 1e-2) for _ in range(2)]}
    try:
        learner.step(terms, 1e-2)
    except FloatingPointError as error:
        found["message"] = str(error)
    found["unchanged"] = all(torch.equal(before[name], tensor) for name, tensor in published(learner).items())
    learner.begin(OPTIMISER)
    found["loss"] = learner.step(terms, 0.0)["loss"]  # a step of length 0 counts, its moments are zeroed below
    learner.begin(OPTIMISER)
    return found


def bfloat16_case(stage: ZeroStage, offload: bool, port: int, folder: Path) -> dict[str, Any]:
    head, rows = all_rows()
    config = LearnerConfig(zero_stage=stage, dtype="bfloat16", micro_batch=2, offload_optimiser=offload)
    learner = make_learner(0, port, folder, config, False, head)
    learner.begin(OPTIMISER)
    losses = [learner.step(terms_of(KD(), rows, step % 3, 0, 1), 1e-3)["loss"] for step in range(8)]
    skipped, before, after = nan_case(learner, rows, 0, 1)
    recovered = learner.step(terms_of(KD(), rows, 0, 0, 1), 1e-3)
    found = {"losses": losses, "skipped": skipped, "before": before, "after": after, "recovered": recovered}
    learner.save(folder / f"bfloat16-{stage}-{offload}")
    found["saved"] = published(learner)
    found["next"] = learner.step(terms_of(KD(), rows, 1, 0, 1), 1e-3)["loss"], published(learner)
    learner.close()
    for name, changes in {"same": {}, "other": {"zero_stage": (stage + 2) % 4, "offload_optimiser": not offload}}.items():
        learner = make_learner(0, port, folder, config.model_copy(update=changes), False, head)
        learner.restore(folder / f"bfloat16-{stage}-{offload}")
        restored = published(learner)
        found[name] = restored, learner.step(terms_of(KD(), rows, 1, 0, 1), 1e-3)["loss"], published(learner)
        learner.close()
    return found


def lonely_rank(rank: int, port: int, folder: Path, results: Any) -> None:
    """Rank 1 dies before the step; rank 0 reports how its step ended."""
    head, rows = all_rows()
    config = LearnerConfig(ranks=2, zero_stage=2, dtype="float32", deadline_s=20)
    learner = make_learner(rank, port, folder, config, False, head)
    if rank == 1:
        os._exit(1)
    try:
        learner.step(terms_of(KD(), rows, 0, rank, 2), 1e-3)
    except RuntimeError as error:
        results.put(str(error))
    else:
        results.put("")


def wrong_head_case(port: int, folder: Path) -> str:
    head, rows = all_rows()
    learner = make_learner(0, port, folder, LearnerConfig(dtype="float32"), False, Head(weight=head.weight * 1.1))
    try:
        learner.step(terms_of(KD(), rows, 0, 0, 1), 1e-3)
    except ValueError as error:
        return str(error)
    finally:
        learner.close()
    return ""


def experts_case(rank: int, ranks: int, stage: ZeroStage, port: int, folder: Path) -> dict[str, Tensor]:
    from raykd.learner import Learner

    config = LearnerConfig(ranks=ranks, zero_stage=stage, dtype="float32")
    learner = Learner(str(folder / "experts"), config=config, rank=rank, address=("127.0.0.1", port), vocab_size=VOCAB)
    weights = published(learner)
    learner.close()
    return weights


# --- the tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained students, tied, untied and with experts, that every learner starts from."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    folder = tmp_path_factory.mktemp("learner")
    experts = MixtralConfig(**{**student_config(False).to_diff_dict(), "model_type": "mixtral", "num_local_experts": 3})
    AutoModelForCausalLM.from_config(experts).save_pretrained(folder / "experts")
    for tied in (False, True):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(student_config(tied)).save_pretrained(folder / f"student-{tied}")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request: pytest.FixtureRequest, folder: Path) -> dict[int, Any]:
    """What every rank found, by rank."""
    context = multiprocessing.get_context("spawn")
    results, place = context.Queue(), meeting_place("127.0.0.1")
    processes = [
        context.Process(target=run_rank, args=(rank, request.param, place.port, folder, results), daemon=True)
        for rank in range(request.param)
    ]
    for process in processes:
        process.start()
    found = {}
    for _ in processes:
        rank, result = results.get(timeout=240)
        if isinstance(result, str):
            for process in processes:
                process.kill()
            pytest.fail(f"rank {rank}: {result}")
        found[rank] = pickle.loads(result)
    for process in processes:
        process.join(timeout=60)
    return found


cases = [pytest.mark.stack, pytest.mark.parametrize("stage", STAGES), pytest.mark.parametrize("tied", [False, True])]


def each_case(test: Callable[..., None]) -> Callable[..., None]:
    """The test for every ZeRO stage, with tied and untied embeddings."""
    for mark in cases:
        test = mark(test)
    return test


@each_case
def test_losses_are_those_of_a_plain_loop(runs: dict[int, Any], folder: Path, stage: int, tied: bool) -> None:
    expected, _ = oracle(folder, tied)
    metrics = [found[stage, tied]["metrics"] for found in runs.values()]
    summed = [sum(rank["loss"] for rank in step) for step in zip(*metrics, strict=True)]
    assert summed == pytest.approx(expected, abs=1e-5)
    assert all(math.isfinite(step["grad_norm"]) and step["skipped"] == 0 for step in runs[0][stage, tied]["metrics"])


@each_case
def test_evaluation_after_a_step_sees_the_next_steps_loss(runs: dict[int, Any], stage: int, tied: bool) -> None:
    metrics = [found[stage, tied]["metrics"] for found in runs.values()]
    evaluated = [sum(rank["evaluated"] for rank in step) for step in zip(*metrics, strict=True)]
    summed = [sum(rank["loss"] for rank in step) for step in zip(*metrics, strict=True)]
    assert evaluated[0:2] == pytest.approx(summed[1:3], abs=1e-6)  # steps 0, 1 and 2 have the same rows


@each_case
def test_published_and_saved_weights_are_those_of_a_plain_loop(
    runs: dict[int, Any], folder: Path, stage: int, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    _, expected = oracle(folder, tied)
    weights = runs[0][stage, tied]["published"]
    saved = AutoModelForCausalLM.from_pretrained(folder / f"{len(runs)}-{stage}-{tied}" / "student")
    assert set(weights) == {name for name, _ in saved.named_parameters()}  # named_parameters names tied weights once
    for name, tensor in saved.named_parameters():
        assert torch.equal(weights[name], tensor), name
    ids = torch.arange(12)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder / f"student-{tied}")
    plain.load_state_dict(expected)
    assert torch.allclose(saved.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-4)
    assert saved.config.attention_dropout == 0.3


@pytest.mark.stack
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_are_published_as_the_checkpoint_has_them(runs: dict[int, Any], folder: Path, stage: int) -> None:
    """Which transformers does not: it keeps all experts of a layer as one tensor."""
    stored = load_file(folder / "experts" / "model.safetensors")
    assert sum("experts" in name for name in stored) == 2 * 3 * 3
    weights = runs[0]["experts"][stage]
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


@pytest.mark.stack
def test_each_rank_holds_its_part_of_the_teachers_head(runs: dict[int, Any]) -> None:
    """Under ZeRO-3; the losses are those of the whole head, above."""
    for rank in runs.values():
        held, whole = rank[3, False]["teacher"]
        assert whole <= held * len(runs) < whole + len(runs)
        assert rank[2, False]["teacher"] == (-1, -1)


@each_case
def test_restoring_continues_with_identical_losses(runs: dict[int, Any], stage: int, tied: bool) -> None:
    for found in runs.values():
        assert found[stage, tied]["second"] == found[stage, tied]["first"]
        assert found[stage, tied]["folders"] == ["checkpoint-1"]
        assert found[stage, tied].get("fresh", found[stage, tied]["first"]) == found[stage, tied]["first"]


@pytest.mark.stack
@pytest.mark.parametrize(("written", "read"), OTHER_STAGES)
def test_another_zero_stage_goes_on_with_the_same_weights_and_losses(runs: dict[int, Any], written: int, read: int) -> None:
    weights, _ = runs[0]["other stages"][written, read]
    saved = runs[0][written, True]["saved"]
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
    expected = [found[written, True]["first"] for found in runs.values()]
    losses = [found["other stages"][written, read][1] for found in runs.values()]
    summed, expected = ([sum(ranks) for ranks in zip(*each, strict=True)] for each in (losses, expected))
    assert summed == pytest.approx(expected, abs=1e-6)


@pytest.mark.stack
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_goes_on_from_its_float32_weights(runs: dict[int, Any], stage: int, offload: bool) -> None:
    """At another ZeRO stage, with AdamW in other memory."""
    if len(runs) > 1:
        pytest.skip("runs with one rank")
    found = runs[0]["bfloat16"][stage, offload]
    expected, expected_weights = found["next"]
    for layout in ("same", "other"):
        restored, loss, weights = found[layout]
        assert all(torch.equal(restored[name], tensor) for name, tensor in found["saved"].items())
        assert loss == pytest.approx(expected, abs=1e-6)
        differ = sum(int((weights[name] != tensor).sum()) for name, tensor in expected_weights.items())
        assert differ <= {"same": 0, "other": sum(tensor.numel() for tensor in weights.values()) // 100}[layout], "but roundings"


@each_case
def test_a_row_that_is_not_a_number_changes_no_weight(runs: dict[int, Any], stage: int, tied: bool) -> None:
    found = runs[0][stage, tied]
    assert found["skipped"] == 1
    assert all(torch.equal(found["before"][name], found["after"][name]) for name in found["before"])


@each_case
def test_an_absurd_gradient_changes_no_weight_and_ends_the_run_when_it_stays(
    runs: dict[int, Any], stage: int, tied: bool
) -> None:
    for rank, found in ((rank, found[stage, tied]["absurd"]) for rank, found in runs.items()):
        if rank == 0:
            assert [(step["skipped"], step["grad_norm"] > 1e-3) for step in found["steps"]] == [(1, True), (1, True)]
        assert "3 steps in a row were skipped" in found["message"]
        assert found["unchanged"]
        assert found["loss"] == pytest.approx(found["steps"][0]["loss"], abs=1e-6)


@pytest.mark.stack
@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_learns_and_skips(runs: dict[int, Any], stage: int, offload: bool) -> None:
    if len(runs) > 1:
        pytest.skip("runs with one rank")
    found = runs[0]["bfloat16"][stage, offload]
    assert found["losses"][-1] < found["losses"][0] - 0.1
    assert found["losses"] == pytest.approx(runs[0]["bfloat16"][1, False]["losses"], abs=2e-2)
    assert found["skipped"] == 1
    assert found["recovered"]["skipped"] == 0, "the gradient of the skipped step is forgotten"
    assert all(torch.equal(found["before"][name], found["after"][name]) for name in found["before"])
    assert all(tensor.dtype is torch.bfloat16 for tensor in found["after"].values())


@pytest.mark.stack
def test_scores_of_another_head_are_refused(runs: dict[int, Any]) -> None:
    if len(runs) > 1:
        pytest.skip("runs with one rank")
    assert "could not be rebuilt" in runs[0]["wrong head"]


def test_nobody_takes_the_port_where_ranks_will_meet() -> None:
    place = meeting_place("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", place.port))


@pytest.mark.stack
def test_a_dead_peer_is_an_error(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results, place = context.Queue(), meeting_place("127.0.0.1")
    processes = [context.Process(target=lonely_rank, args=(rank, place.port, folder, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        assert results.get(timeout=120)
    finally:
        for process in processes:
            process.kill()


def test_a_checkpoint_that_was_not_completed_is_not_restored(tmp_path: Path) -> None:
    from raykd.learner import Learner

    (tmp_path / "checkpoint-0").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        Learner.restore(object.__new__(Learner), tmp_path)


def test_a_checkpoint_of_another_student_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raykd.learner import LATEST, Learner

    (tmp_path / LATEST).write_text("checkpoint-1")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "learner.json").write_text(json.dumps({"parameters": "of two layers"}))
    monkeypatch.setattr(Learner, "_described", lambda self: {"parameters": "of three layers"})
    with pytest.raises(ValueError, match="is of another student: its parameters have other names or sizes"):
        Learner.restore(object.__new__(Learner), tmp_path)


def test_importing_the_learner_does_not_import_deepspeed() -> None:
    code = "import sys, raykd.learner; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": ROOT}).returncode == 0
