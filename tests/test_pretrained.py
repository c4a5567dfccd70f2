"""A model by the name that users give it."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from example_text import text_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from raykd.algorithms import GKD, KD
from raykd.experiment import EvaluationConfig, Experiment, Model, Stage
from raykd.models import check_models, model_facts, vocabulary
from raykd.pretrained import eos_ids, known_ids, load_model, locate, shared_ids
from raykd.run import prepare
from raykd.sources import Pairs


def experiment(student: Model, teacher: Model, data: str = "x") -> Experiment:
    """A step of GKD, with one prompt held out."""
    stages = (Stage(algorithm=GKD(), steps=1),)
    evaluation = EvaluationConfig(prompts=1)
    return Experiment(name="x", student=student, teacher=teacher, data=Pairs(path=data), stages=stages, evaluation=evaluation)


def test_a_folder_a_run_directory_and_a_name_on_the_hub_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    student = tmp_path / "runs/mine/student"
    student.mkdir(parents=True)
    assert locate("student.path", "./model") == locate("student.path", "model") == str(tmp_path / "model")
    assert locate("student.path", "runs/mine") == str(tmp_path / "runs/mine"), "no student has been saved there"
    (student / "config.json").write_text("{}")
    assert locate("student.path", "runs/mine") == str(student)
    assert locate("student.path", "owner/name") == "owner/name"
    with pytest.raises(ValueError, match=r"student.path ./no/such: no such folder; give a Hugging Face model folder, a run dir"):
        locate("student.path", "./no/such")


def test_a_response_ends_at_the_tokenizers_eos_and_at_those_that_the_model_lists(tmp_path: Path) -> None:
    tokenizer = text_tokenizer()
    own = tokenizer.eos_token_id
    assert isinstance(own, int) and eos_ids(str(tmp_path), tokenizer) == (own,), "no generation_config.json"
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(2 * (json.dumps({"prompt": "a", "response": tokenizer.decode([11, 7, 5])}) + "\n"))
    model = Model(path=str(tmp_path))
    run = experiment(model, model, data=str(rows))
    for listed, others, answer in (
        ([7, own, 5, 7], (7, 5), (11, 7)),
        (own, (), (11, 7, 5, own)),
        (7, (7,), (11, 7)),
        ([5, len(tokenizer)], (5,), (11, 7, 5)),
        (None, (), (11, 7, 5, own)),
    ):
        GenerationConfig(eos_token_id=listed).save_pretrained(tmp_path)
        assert eos_ids(str(tmp_path), tokenizer) == (own, *others)
        assert model_facts(run, tokenizer, len(tokenizer), tmp_path).eos_ids == (own, *others)
        assert prepare(run, tokenizer).held_out[0].response == answer, "and so do reference answers"


def test_an_eos_copied_from_the_architectures_default_is_no_wish(tmp_path: Path) -> None:
    tokenizer = text_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=7, **sizes))
    model.save_pretrained(tmp_path)
    assert eos_ids(str(tmp_path), tokenizer) == (tokenizer.eos_token_id,)
    model.generation_config.eos_token_id = [7, 5]
    model.save_pretrained(tmp_path)
    assert eos_ids(str(tmp_path), tokenizer) == (tokenizer.eos_token_id, 7, 5), "nobody's default is a list"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers draws them at random, and says so only in its log."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, tie_word_embeddings=True, **sizes))
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).get_output_embeddings() is not None, "tied weights stand there once"
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(
        ValueError, match=r"lacks 9 weights of LlamaForCausalLM, model.layers.0.input_layernorm.weight among them"
    ):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"lacks 1\d weights of LlamaForSequenceClassification, .* another kind of model"):
        load_model(str(tmp_path), AutoModelForSequenceClassification)


def test_a_model_may_lack_rows_for_tokens_that_were_added_at_the_end_and_no_others() -> None:
    tokenizer = deepcopy(text_tokenizer())
    usual = len(tokenizer)
    assert known_ids("student", tokenizer, LlamaConfig(vocab_size=usual + 9)) == usual, "padded"
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    for rows, known in ((usual, usual), (usual + 1, usual + 1)):
        assert known_ids("student", tokenizer, LlamaConfig(vocab_size=rows)) == known
    with pytest.raises(
        ValueError, match=rf"student: vocab_size {usual - 1} is smaller than the tokenizer's {usual + 1} ids; they"
    ):
        known_ids("student", tokenizer, LlamaConfig(vocab_size=usual - 1))


def test_tokenizers_may_differ_by_tokens_that_were_added_to_one_of_them() -> None:
    """As Qwen3's do from Qwen2.5's."""
    names = ("student.path a", "teacher.path b")

    def ids(texts: str, *added: str) -> PreTrainedTokenizerFast:
        words = {word: index for index, word in enumerate(texts.split())}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")))
        tokenizer.add_tokens(list(added))
        return tokenizer

    plain, thinks = ids("a b c", "<end>"), ids("a b c", "<end>", "<think>", "</think>")
    assert [shared_ids(names, pair) for pair in ((plain, thinks), (thinks, plain), (thinks, thinks))] == [4, 4, 6]
    for other, said in (
        (ids("a b c", "<end>", "<image>"), r"\(id 4 is '<think>' and '<image>'\)"),
        (ids("a b c d", "<end>"), r"\(id 3 is '<end>' and 'd'\)"),
        (ids("a c b", "<end>"), r"\(id 1 is 'b' and 'c'\)"),
    ):
        with pytest.raises(ValueError, match=rf"student.path a and teacher.path b have different tokenizers {said}: their"):
            shared_ids(names, (thinks, other))
    with pytest.raises(ValueError, match=r"id 2 is None and 'c'"):
        shared_ids(names, (ids("a b"), ids("a b c")))  # which nobody added


def test_a_token_that_student_or_teacher_does_not_know_is_named(tmp_path: Path) -> None:
    tokenizer = deepcopy(text_tokenizer())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "<image>"}\n')
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for name, ids in (("all", tokenizer), ("fewer", text_tokenizer())):
        ids.save_pretrained(tmp_path / name)
    student = Model(path=str(tmp_path / "all"), scratch=llama)
    for teacher in (
        student.model_copy(update={"scratch": llama | {"vocab_size": len(tokenizer) - 1}}),
        Model(path=str(tmp_path / "fewer"), scratch=llama),
    ):
        run = experiment(student, teacher, data=str(rows))
        assert vocabulary(run, tokenizer) == len(tokenizer) - 1
        with pytest.raises(ValueError, match=r"data rows.jsonl:1 \(counted from 0\) has the token <image>, which student or"):
            prepare(run, tokenizer)
    prepared = prepare(run.model_copy(update={"teacher": student}), tokenizer)
    assert len(prepared.held_out) == 1, "a model from scratch has a row for each"


def test_a_teacher_may_end_where_its_student_does_too(tmp_path: Path) -> None:
    """As an instruction-tuned teacher and a student that is not: the same ids, and another EOS."""
    tokenizer = deepcopy(text_tokenizer())
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_attention_heads=1)
    ).save_pretrained(tmp_path / "student")
    shutil.copytree(tmp_path / "student", tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "student")
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(tmp_path / "teacher")
    run = experiment(Model(path=str(tmp_path / "student")), Model(path=str(tmp_path / "teacher")))
    with pytest.raises(
        ValueError, match=r"teacher ends a response with !, after which .*student would go on: add 2 to eos_token_id"
    ):
        check_models(run)
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(tmp_path / "student")
    check_models(run)


def test_texts_that_are_longer_than_the_short_position_embeddings_of_a_model_are_refused(tmp_path: Path) -> None:
    """transformers and vLLM choose between the two by different lengths."""
    tokenizer = text_tokenizer()
    factors: dict[str, Any] = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=None,
        eos_token_id=None,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters=factors,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = Model(path=str(tmp_path))
    run = experiment(model, model).model_copy(update={"max_prompt": 40, "max_response": 24})
    check_models(run)
    with pytest.raises(
        ValueError, match=r"max_prompt 41 \+ max_response 24 = 65 tokens, but student.path .* \(longrope\) from 64"
    ):
        check_models(run.model_copy(update={"max_prompt": 41}))


def test_a_student_that_a_running_engine_cannot_take_is_refused_before_anything_starts(tmp_path: Path) -> None:
    tokenizer = text_tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    tokenizer.save_pretrained(tmp_path)
    oss, llama = (Model(path=str(tmp_path), scratch={"model_type": kind, **sizes}) for kind in ("gpt_oss", "llama"))
    with pytest.raises(ValueError, match=r"student.path .*: vLLM's running engine cannot be given new weights of gpt_oss, so"):
        check_models(experiment(oss, llama))
    check_models(experiment(llama, oss))
    alone = Stage(algorithm=KD(), steps=1)
    check_models(experiment(oss, oss).model_copy(update={"stages": (alone,), "evaluation": EvaluationConfig(prompts=0)}))


def test_a_teacher_that_vllm_computes_otherwise_is_refused_there(tmp_path: Path) -> None:
    text_tokenizer().save_pretrained(tmp_path)
    gemma, llama = (Model(path=str(tmp_path), scratch={"model_type": kind}) for kind in ("gemma3n_text", "llama"))
    run = experiment(llama, gemma)
    check_models(run)
    by_vllm = run.model_copy(update={"teachers": run.teachers.model_copy(update={"backend": "vllm"})})
    with pytest.raises(ValueError, match=r"teacher.path .*: vLLM computes other log-probs of gemma3n_text than transformers"):
        check_models(by_vllm)
