"""Which models a run is of: that they are there, belong together and can be run, and the folders that workers load them from."""

import glob
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer

from raykd.actors import ModelFacts
from raykd.experiment import Experiment, Model
from raykd.lora import check_targets
from raykd.pretrained import check_kind, eos_ids, known_ids, load, load_config, locate, shared_ids
from raykd.tokenise import eos_id

OF_ANY_ARCHITECTURE = ("model_type", "quantization_config", "rope_theta", "rope_scaling", "torch_dtype", "attn_implementation")
"""Fields of a configuration that transformers knows though no architecture lists them."""

NOT_IN_A_RUNNING_ENGINE = ("gpt_oss", "gemma3n_text")
"""Architectures of which a running engine gets no new weights: vLLM's loader fills some layers unseen by its own reloading."""
OTHERWISE_IN_VLLM = ("gemma3n_text",)
"""Architectures whose log-probs are others in vLLM than in transformers, by a nat and more."""


def check_models(experiment: Experiment) -> PreTrainedTokenizerBase:
    """The shared tokenizer; raises ValueError when a model is missing, too short, or speaks other ids than the student."""
    tokenizer = load("student.path", experiment.student.path, AutoTokenizer)
    if experiment.teacher is not None:
        teacher_tokenizer = load("teacher.path", experiment.teacher.path, AutoTokenizer)
        _shared_with_teacher(experiment, tokenizer, teacher_tokenizer)
        if (end := eos_id(teacher_tokenizer)) not in ends(experiment.student, tokenizer):
            raise ValueError(
                f"teacher.path {experiment.teacher.path} ends a response with {teacher_tokenizer.eos_token}, after which "
                f"student.path {experiment.student.path} would go on: add {end} to eos_token_id in the student's "
                "generation_config.json, or make it the eos_token of its tokenizer"
            )
    for role, model in _roles(experiment).items():
        config = config_of(role, model, tokenizer)
        if model.scratch is None:
            _check_weights(role, model.path)
        known_ids(role, tokenizer, config)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and limit < experiment.max_length:
            raise ValueError(
                f"max_prompt {experiment.max_prompt} + max_response {experiment.max_response} = {experiment.max_length} tokens, "
                f"but {role}.path {model.path} takes at most {limit}; lower one of the two"
            )
        _check_positions(role, model, config, experiment)
        _check_engines(role, model, config, experiment)
        if role == "student" and experiment.learner.lora.rank:
            check_targets(config, experiment.learner.lora.targets)
    return tokenizer


def model_facts(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: Path) -> ModelFacts:
    """What every worker must agree on; models from scratch are initialised into the run directory ``folder``."""
    teacher = experiment.teacher
    return ModelFacts(
        student=_model_folder("student", experiment.student, tokenizer, experiment, folder),
        teacher=_model_folder("teacher", teacher, tokenizer, experiment, folder) if teacher else None,
        vocab_size=vocab_size,
        eos_ids=ends(experiment.student, tokenizer),
        max_length=experiment.max_length,
        seed=experiment.seed,
        run=str(folder),
    )


def vocabulary(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> int:
    """The size of the vocabulary that student and teacher share: every softmax runs over exactly these ids."""
    known = min(known_ids(role, tokenizer, config_of(role, model, tokenizer)) for role, model in _roles(experiment).items())
    if experiment.teacher is None:
        return known
    teacher_tokenizer = load("teacher.path", experiment.teacher.path, AutoTokenizer)
    return min(known, _shared_with_teacher(experiment, tokenizer, teacher_tokenizer))


def _shared_with_teacher(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> int:
    assert experiment.teacher is not None
    names = f"student.path {experiment.student.path}", f"teacher.path {experiment.teacher.path}"
    return shared_ids(names, (tokenizer, teacher_tokenizer))


def ends(student: Model, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response, of the data's and of everybody's who writes."""
    return (eos_id(tokenizer),) if student.scratch else eos_ids(locate("student.path", student.path), tokenizer)


def _roles(experiment: Experiment) -> dict[str, Model]:
    return {"student": experiment.student} | ({"teacher": experiment.teacher} if experiment.teacher else {})


def config_of(role: str, model: Model, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the student or the teacher; ValueError where there is none, or one that cannot be distilled."""
    if model.scratch is None:
        return load_config(f"{role}.path", model.path)
    return _architecture(role, {"vocab_size": len(tokenizer), **model.scratch})


def _architecture(role: str, scratch: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model that begins at random; transformers would take misspelt fields without a word."""
    kind = str(scratch.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{role}.scratch: model_type {kind!r} is no architecture of transformers; name one, e.g. llama")
    usual = CONFIG_MAPPING[kind]()
    check_kind(f"{role}.scratch", usual)
    known = {*vars(usual), *usual.attribute_map, *OF_ANY_ARCHITECTURE}
    if unknown := sorted(set(scratch) - known):
        raise ValueError(f"{role}.scratch: {kind} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    try:
        return AutoConfig.for_model(**scratch)
    except Exception as error:  # each of its fields may refuse in a way of its own
        raise ValueError(f"{role}.scratch: {error}") from error


def _check_weights(role: str, path: str) -> None:
    folder = Path(locate(f"{role}.path", path))
    if folder.is_dir() and not any(any(folder.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin")):
        raise ValueError(f"{role}.path {path} has a configuration and no weights (*.safetensors); copy them there")


def _check_positions(role: str, model: Model, config: PreTrainedConfig, experiment: Experiment) -> None:
    """Raises ValueError where long texts have other position embeddings than short ones: transformers takes those for the longest
    text of a batch, vLLM those for the longest that it may be given."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # for all layers, or by their kind
        limit = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
        if limit and rope.get("rope_type") == "longrope" and limit < experiment.max_length:
            raise ValueError(
                f"max_prompt {experiment.max_prompt} + max_response {experiment.max_response} = {experiment.max_length} tokens, "
                f"but {role}.path {model.path} has other position embeddings (longrope) from {limit} tokens on, which shorter "
                "texts would get in some programs and not in others; lower one of the two"
            )


def _check_engines(role: str, model: Model, config: PreTrainedConfig, experiment: Experiment) -> None:
    """Raises ValueError where the programs that are to run a model cannot."""
    replicas = experiment.rollout if role == "student" else experiment.teachers
    parts, heads = replicas.engine.tensor_parallel, getattr(config, "num_attention_heads", None)
    if heads and heads % parts:
        raise ValueError(
            f"{role}.path {model.path} has {heads} attention heads, engine.tensor_parallel {parts} does not divide them"
        )
    place = str(experiment.runs.expanduser().resolve()) if model.scratch else locate(f"{role}.path", model.path)
    by_vllm = experiment.num_rollouts if role == "student" else experiment.teacher_starts_vllm
    if by_vllm and glob.has_magic(place):
        raise ValueError(f"{role}: vLLM takes {place} for a pattern, since it has a *, a ? or a [; rename it")
    if by_vllm and role == "student" and config.model_type in NOT_IN_A_RUNNING_ENGINE:
        raise ValueError(
            f"student.path {model.path}: vLLM's running engine cannot be given new weights of {config.model_type}, so that this "
            "student could not write what it has learned; choose another architecture, or only stages that learn from data, with "
            "evaluation.prompts 0. As a teacher on transformers it works"
        )
    if by_vllm and role == "teacher" and config.model_type in OTHERWISE_IN_VLLM:
        raise ValueError(
            f"teacher.path {model.path}: vLLM computes other log-probs of {config.model_type} than transformers; set "
            "teachers.backend to transformers, and have no stage in which the teacher writes"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised and role == "student":
        raise ValueError(
            f"student.path {model.path} is quantised ({_method(quantised)}): it cannot be trained; name its original"
        )
    if quantised and experiment.teachers.backend == "transformers":
        try:
            AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment()
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"teacher.path {model.path} is quantised ({_method(quantised)}), and transformers cannot read it: {error}; "
                "set teachers.backend to vllm"
            ) from error


def _method(quantised: Any) -> str:
    return str(quantised["quant_method"] if isinstance(quantised, dict) else quantised.quant_method)


def _model_folder(role: str, model: Model, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, folder: Path) -> str:
    """Where a model's weights are; an architecture from scratch is initialised into the run directory first."""
    target = folder / f"{role}_init"
    if model.scratch is None:
        return locate(f"{role}.path", model.path)
    if not target.exists():
        torch.manual_seed(experiment.seed)
        config = config_of(role, model, tokenizer)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return str(target)
