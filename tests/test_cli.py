"""Bad input gets one sentence naming field, value and remedy, before any actor starts."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from example_text import text
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from raykd import cli
from raykd.actors import ModelFacts
from raykd.algorithms import GKD, KD, SFT
from raykd.experiment import EvaluationConfig, Experiment, LearnerConfig, Model, Stage
from raykd.run import connect, idle_gpus, prepare
from raykd.run_directory import describe, new_folder
from raykd.sources import Conversations, Pairs

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
}


def experiment(runs: Path) -> Experiment:
    student = Model(path=str(text().tokenizer), scratch=LLAMA)
    return Experiment(
        name="bad-input",
        student=student,
        teacher=student,
        data=Pairs(path=str(text().pairs), limit=20),
        stages=(Stage(algorithm=KD(), steps=1, batch_size=4),),
        max_prompt=32,
        max_response=16,
        learner=LearnerConfig(dtype="float32"),
        evaluation=EvaluationConfig(prompts=2),
        runs=runs,
    )


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, base: Experiment, *options: str) -> str:
    """What a user reads, on one line; the command must exit with 2 and leave no run directory."""
    monkeypatch.setattr("sys.argv", ["experiment.py", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main(base)
    assert stopped.value.code == 2
    assert not list(base.runs.glob("bad-input*"))
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def join_a_cluster_of(resources: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one node with these resources, as Ray names them."""
    monkeypatch.setattr("raykd.run.connect", lambda experiment: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": resources}, {"Alive": False, "Resources": {}}])
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def other_tokenizer(folder: Path) -> str:
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["other words"], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def test_bad_input_is_named_with_its_field_and_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base = experiment(tmp_path / "runs")
    empty = write(tmp_path / "empty.jsonl", [])
    unnamed = write(tmp_path / "unnamed.jsonl", [{"prompt": "a", "response": "b"}, {"question": "c", "response": "d"}])
    few = write(tmp_path / "few.jsonl", [{"prompt": "a", "response": "b"}])
    broken = str(tmp_path / "broken.jsonl")
    Path(broken).write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp')
    chats = write(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "response": "b"}])
    cases = {
        ("--teacher.path", "./no/such/model"): [
            "teacher.path ./no/such/model",
            "no such folder",
            "give a Hugging Face model folder",
        ],
        ("--data.path", "./missing.jsonl"): ["data file ./missing.jsonl does not exist", "give the path of a file"],
        ("--data.path", empty): [empty, "is empty"],
        ("--data.path", unnamed): ["unnamed.jsonl, row 2: no field 'prompt'", "question, response", "name the right fields"],
        ("--data.path", few): ["gives 1 prompts, evaluation.prompts holds out 2", "hold out fewer"],
        ("--teacher.path", other_tokenizer(tmp_path / "other")): ["different tokenizers", "choose a pair that shares one"],
        ("--max-response", "40"): ["max_prompt 32 + max_response 40 = 72", "at most 64", "lower one"],
        ("--learner.ranks", "9"): ["learner.ranks 9 is more than the smallest batch_size", "use fewer ranks"],
        ("--teachers.engine.tensor-parallel", "2"): ["teacher.path", "1 attention heads", "tensor_parallel 2 does not divide"],
        ("--learner.lora.rank", "4", "--learner.lora.targets", "q_proj", "query"): [
            "learner.lora.targets: llama has no linear layers named query that can be adapted",
            "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ],
        ("--data.prompt", "question"): ["'question' names no field of the rows", "write one as {name}"],
        ("--data.prompt", "{meta.title}"): ["'{meta.title}' asks for a part of a field, {meta.title}", "with a field for it"],
        ("--data.prompt", "{question"): ["'{question' is no template", "a field is {name}"],
        ("--data.path", broken): [broken, "cannot be read", "JSON parse error"],
        ("--data.path", chats): ["chats.jsonl, row 1: field 'prompt' is no text but a list"],
        ("--runs", "s3://bucket/runs"): ["s3:/bucket/runs is an address", "mount the storage"],
        ("--data.split", "train[100%:]"): ["split train[100%:]", "no data"],
        ("--stages.0.steps", "0"): ["stages.0", "steps", "greater than or equal to 1"],
        ("--stepps", "3"): ["--stepps"],
    }
    for options, expected in cases.items():
        said = complaint(capsys, monkeypatch, base, *options)
        for part in expected:
            assert part in said, f"{options}: {said}"


def test_conversations_are_data_with_options_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    chats = write(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 4)
    base = experiment(tmp_path / "runs").model_copy(update={"data": Conversations(path=chats)})
    assert "row 1: field 'messages' ends with a message of user" in complaint(capsys, monkeypatch, base)
    without = ("--data.no-answers", "--data.chat.system", "b")
    assert "KD learns from reference answers, but data.answers is False" in complaint(capsys, monkeypatch, base, *without)
    on_policy = base.model_copy(update={"stages": (Stage(algorithm=GKD(), steps=1, batch_size=4),)})
    assert "chats.jsonl, row 1: tokenizer" in complaint(capsys, monkeypatch, on_policy, *without)
    assert Experiment.model_validate_json(on_policy.model_dump_json()) == on_policy


@pytest.mark.parametrize(
    ("scratch", "expected"),
    [
        ({"hidden_size": 64}, "student.scratch: model_type '' is no architecture of transformers"),
        ({"model_type": "lama"}, "student.scratch: model_type 'lama' is no architecture"),
        (LLAMA | {"hiden_size": 64}, "student.scratch: llama has no field hiden_size; it has "),
        (LLAMA | {"hidden_size": "64"}, "student.scratch: "),
        ({"model_type": "t5"}, "student.scratch: t5 is an encoder-decoder model"),
        ({"model_type": "gemma3"}, "student.scratch: gemma3 takes more than text"),
    ],
)
def test_an_architecture_that_cannot_be_made_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    scratch: dict[str, Any],
    expected: str,
):
    base = experiment(tmp_path / "runs")
    wrong = Model(path=base.student.path, scratch=scratch)
    assert expected in complaint(capsys, monkeypatch, base.model_copy(update={"student": wrong}))


def test_a_key_that_weights_and_biases_refuses_is_named_before_any_actor_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    join_a_cluster_of({"memory": 1e9, "object_store_memory": 1e9}, monkeypatch)
    monkeypatch.setattr("raykd.run.start_workers", lambda *_: pytest.fail("actors start"))
    monkeypatch.setattr("sys.argv", ["experiment.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(experiment(tmp_path / "runs"))
    assert stopped.value.code == 2
    assert "Weights & Biases: " in capsys.readouterr().out


def test_an_interrupted_run_says_what_is_left_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    join_a_cluster_of({"memory": 1e9, "object_store_memory": 1e9}, monkeypatch)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr("raykd.run.start_workers", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.argv", ["experiment.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(experiment(tmp_path / "runs"))
    assert stopped.value.code == 130
    said = capsys.readouterr()
    assert f"stopped before the first checkpoint of {tmp_path / 'runs'}" in said.out and "Traceback" not in said.out + said.err


def test_a_folder_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    base = experiment(tmp_path / "runs")
    folder = tmp_path / "bare"
    shutil.copytree(base.student.path, folder)
    AutoConfig.for_model(**LLAMA).save_pretrained(folder)
    bare = base.model_copy(update={"teacher": Model(path=str(folder))})
    assert f"teacher.path {folder} has a configuration and no weights" in complaint(capsys, monkeypatch, bare)


def test_what_vllm_would_take_for_a_pattern_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    said = complaint(capsys, monkeypatch, experiment(tmp_path / "runs[1]"))
    assert "student: vLLM takes" in said and "rename it" in said


def test_the_best_by_rouge_l_takes_answers_with_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base = experiment(tmp_path / "runs")
    data = Pairs(path=write(tmp_path / "mute.jsonl", [{"prompt": "a", "response": ""}] * 9))
    stages = (base.stages[0].model_copy(update={"keep": "rouge_l"}),)
    evaluation = EvaluationConfig(prompts=2, every=1)
    mute = base.model_copy(update={"data": data, "stages": stages, "evaluation": evaluation})
    assert "none of the 2 held-out answers has any text" in complaint(capsys, monkeypatch, mute)


def test_gpus_are_counted_on_each_node_and_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr(
        "ray.nodes", lambda: [{"Alive": True, "Resources": {"GPU": 1.0}}] * 2 + [{"Alive": False, "Resources": {"GPU": 8.0}}]
    )
    base = experiment(tmp_path / "runs")
    connect(base)
    with pytest.raises(ValueError, match=r"teachers\.gpus 2 must be on one node, no node of the cluster has more than 1 GPUs"):
        connect(base.model_copy(update={"teachers": base.teachers.model_copy(update={"gpus": 2})}))
    whole = {name: getattr(base, name).model_copy(update={"gpus": 1}) for name in ("learner", "teachers", "rollout")}
    with pytest.raises(ValueError, match=r"asks for 3 GPUs .* the cluster has 2; lower them or add nodes"):
        connect(base.model_copy(update=whole))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray tries for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS {address} cannot be reached \(.*refused\): start Ray there, or unset it"):
        connect(experiment(tmp_path / "runs"))


def test_a_folder_that_a_node_does_not_see_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    facts = ModelFacts(student="s", teacher=None, vocab_size=4, eos_ids=(0,), max_length=8, seed=0)
    facts.check(None, str(tmp_path), "name/on-the-hub")
    with pytest.raises(ValueError, match=r"node 10\.0\.0\.7 does not see /nowhere/model"):
        facts.check("/nowhere/model")


def test_gpus_that_nobody_asks_for_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0})
    base = experiment(tmp_path / "runs").model_copy(update={"stages": (Stage(algorithm=GKD(), steps=1),)})
    said = idle_gpus(base)
    assert said.startswith("the cluster has 2 GPUs, learner.gpus, teachers.gpus, rollout.gpus ask for none")
    whole = {name: getattr(base, name).model_copy(update={"gpus": 0.5}) for name in ("learner", "teachers", "rollout")}
    assert idle_gpus(base.model_copy(update=whole)) == ""
    monkeypatch.setattr("ray.cluster_resources", dict)
    assert idle_gpus(base) == ""


def test_it_is_said_how_many_rows_are_left_out(tmp_path: Path):
    base = experiment(tmp_path / "runs").model_copy(update={"max_prompt": 8})
    tokenizer = AutoTokenizer.from_pretrained(base.student.path)
    rows = [{"prompt": "a", "response": "b"}] * 5 + [{"prompt": "a word " * 20, "response": "b"}] * 2
    data = base.data.model_copy(update={"path": write(tmp_path / "long.jsonl", rows)})
    said = prepare(base.model_copy(update={"data": data}), tokenizer).left_out
    assert said.endswith("long.jsonl: 5 of 7 rows are used, the others are too long for max_prompt 8")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    data = Conversations(path=write(tmp_path / "chats.jsonl", chats), answers=False)
    prepared = prepare(base.model_copy(update={"data": data}), tokenizer)
    assert prepared.left_out.endswith("chats.jsonl: 5 of 7 rows are used, the others are too long for max_prompt 8")
    assert prepared.decode(prepared.held_out[0].tokens) == "a\n"


def test_a_quantised_model_is_refused_where_it_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base = experiment(tmp_path / "runs")
    packed = Model(path=base.student.path, scratch=LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    said = complaint(capsys, monkeypatch, base.model_copy(update={"student": packed}))
    assert "is quantised (awq): it cannot be trained; name its original" in said
    said = complaint(capsys, monkeypatch, base.model_copy(update={"teacher": packed}))
    assert "is quantised (awq), and transformers cannot read it" in said and "set teachers.backend to vllm" in said


@pytest.mark.stack
def test_more_gpus_than_the_cluster_has_are_refused_before_any_actor_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    said = complaint(capsys, monkeypatch, experiment(tmp_path / "runs"), "--learner.gpus", "64")
    assert "learner.gpus 64 must be on one node, no node of the cluster has more than" in said


def test_show_prints_the_experiment_with_the_options_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["experiment.py", "--show", "--stages.0.steps", "7", "--learner.lora.rank", "16"])
    cli.main(experiment(tmp_path))
    shown = Experiment.model_validate_json(capsys.readouterr().out)
    assert shown.stages[0].steps == 7 and shown.learner.lora.rank == 16


def test_a_plan_is_printed_and_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raykd.run.connect", lambda experiment: pytest.fail("it starts"))
    monkeypatch.setattr("sys.argv", ["experiment.py", "--plan", "--learner.ranks", "3"])
    cli.main(experiment(tmp_path / "runs"))
    said = capsys.readouterr().out
    assert "3 x learner rank, CPU" in said and "a checkpoint is" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("device", "gpus", "offers"), [("GPU", "1", "has 25.8 GB"), ("node", "0", "had, free when Ray was started, 60.0 GB")]
)
def test_a_learner_that_no_gpu_or_no_node_can_hold_is_refused_before_any_actor_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str, gpus: str, offers: str
):
    wide = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4, "num_attention_heads": 64}
    base = experiment(tmp_path / "runs")
    large = base.model_copy(update={"student": Model(path=base.student.path, scratch=wide)})
    monkeypatch.setattr("raykd.run.start_workers", lambda *_: pytest.fail("actors start"))
    resources = {"GPU": 8.0, "accelerator_type:L4": 1.0, "memory": 4e10, "object_store_memory": 2e10}
    join_a_cluster_of(resources, monkeypatch)
    said = complaint(capsys, monkeypatch, large, "--learner.gpus", gpus, "--learner.dtype", "bfloat16")
    assert f"a learner rank needs 70.2 GB on its {device}" in said
    assert f"the largest {device} of the cluster {offers}" in said
    assert not (tmp_path / "runs").exists()


def test_a_scale_replaces_the_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["experiment.py", "--scale", "tiny", "--show"])
    tiny = experiment(tmp_path).model_copy(update={"name": "tiny", "stages": (Stage(algorithm=SFT(), steps=1),)})
    cli.main(experiment(tmp_path), scales={"tiny": lambda: tiny})
    assert Experiment.model_validate_json(capsys.readouterr().out) == tiny


def test_resume_auto_takes_the_newest_run_of_its_name_that_has_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    base = experiment(tmp_path / "elsewhere")

    def shown() -> Experiment:
        options = ["--runs", str(tmp_path), "--scale", "tiny", "--resume", "auto", "--seed", "7", "--show"]
        monkeypatch.setattr("sys.argv", ["experiment.py", *options])
        cli.main(base, scales={"tiny": lambda: base.model_copy(update={"max_response": 15})})
        return Experiment.model_validate_json(capsys.readouterr().out)

    assert (shown().max_response, shown().seed) == (15, 7), "a new run, of the scale that is asked for"
    for place, name in enumerate(["bad-input", "bad-input-2", "bad-input-10", "bad-input-11", "bad-input-more", "bad-inputs"]):
        describe(
            base.model_copy(update={"max_response": place + 1}),
            new_folder(base.model_copy(update={"name": name, "runs": tmp_path})),
        )
        if name != "bad-input-11":  # which died before its first checkpoint
            checkpoint = tmp_path / name / "checkpoints" / "step-000002"
            checkpoint.mkdir(parents=True)
            (checkpoint / "driver.json").write_text('{"position": {"total": 2}, "streams": {}}')
    assert (shown().max_response, shown().seed) == (3, 7), "that of bad-input-10, with the options applied"
