"""Experiment -> checks -> workers -> loop -> close. Whatever can be known to fail fails here, before any actor starts."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from raykd.actors import ModelFacts
from raykd.checkpoints import Checkpoint, newest_checkpoint, restore_workers, what_is_left
from raykd.experiment import Experiment, FunctionReward
from raykd.fleet import ActorLost, last_line
from raykd.models import check_models, ends, model_facts, vocabulary
from raykd.phases import Position
from raykd.planning import Room, gpu_bytes, plan
from raykd.prompts import Data, Prompts, PromptStream
from raykd.report import write_report
from raykd.reward import load_function
from raykd.run_directory import describe, new_folder, refuse_changes
from raykd.sources import Documents, read_rows
from raykd.start import start_workers
from raykd.tokenise import pack_text, tokenise, tokenise_documents
from raykd.tracking import Tracker, say
from raykd.train import train
from raykd.usage import advice
from raykd.validation import measure
from raykd.workers import Workers

REACH_S = 30.0
"""Longest wait for somebody to answer at the address of a cluster."""


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
    # Its whole path, since actors have working directories of their own.
    checkpoint = newest_checkpoint(resume.expanduser().resolve()) if resume else None
    if checkpoint:
        refuse_changes(experiment, checkpoint)
    elif resume:
        raise ValueError(f"run {resume} has no complete checkpoint; start it afresh without --resume")
    disable_progress_bar()  # of loading and writing weights; the run has its own
    tokenizer = check_models(experiment)
    if isinstance(experiment.reward, FunctionReward):
        load_function(experiment.reward.name)
    data = prepare(experiment, tokenizer)
    if checkpoint:
        data.restore(checkpoint.data)
    if data.left_out:
        say(console, data.left_out)
    connect(experiment)
    refuse_too_large(experiment, tokenizer, data.vocab_size)
    if idle := idle_gpus(experiment):
        say(console, idle)
    folder = checkpoint.run if checkpoint else new_folder(experiment)
    facts = model_facts(experiment, tokenizer, data.vocab_size, folder)
    say(console, f"run directory {folder}; starting the workers")
    tracking, config = experiment.tracking, experiment.model_dump(mode="json")
    # Before the workers: Weights & Biases may refuse its key.
    tracker = Tracker(folder, config, name=folder.name, wandb=tracking.wandb, project=tracking.project, console=console)
    with _tells_what_is_left(console, folder), closing(tracker):
        workers = start_workers(experiment, facts)
        with tracker:
            before, after = _train(experiment, facts, workers, data, tracker, folder, checkpoint)
            stages = experiment.stages
            say(console, advice(folder, max(s.max_staleness for s in stages), any(s.in_flight for s in stages)))
            tokenizer.save_pretrained(folder / "student")
    say(console, f"report: {write_report([folder])}")
    return Result(folder=folder, student=folder / "student", before=before, after=after)


def _train(
    experiment: Experiment,
    facts: ModelFacts,
    first: Workers,
    data: Data,
    tracker: Tracker,
    folder: Path,
    checkpoint: Checkpoint | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """From the checkpoint, or from the beginning, to the student's folder; returns the held-out numbers before and after.
    Where a learner rank or a whole fleet is lost, other workers than the ``first`` go on from the newest checkpoint."""
    workers: Workers | None = first
    begun, before, losses = data.state(), {}, 0
    while True:
        try:
            with closing(workers or start_workers(experiment, facts)) as workers, _tells_loss(workers):
                at = restore_workers(workers, checkpoint) if checkpoint else Position()
                if checkpoint:  # what a checkpoint refuses does not stay in the run directory
                    describe(experiment, folder)
                before = before if checkpoint else measure(experiment, workers, data, tracker, at)
                after = train(experiment, workers, data, tracker, folder, at)
                workers.save_student(folder / "student")
                return before, after
        except ActorLost as loss:
            workers, last, checkpoint = None, checkpoint, newest_checkpoint(folder)
            stuck = checkpoint == last
            losses = losses + 1 if stuck else 1
            if losses > experiment.restarts or (stuck and loss.restarted):
                raise
            data.restore(checkpoint.data if checkpoint else begun)
            goes_on = f"go on after step {checkpoint.position.total}" if checkpoint else "begin again"
            say(tracker.console, f"{loss}\nnew workers {goes_on}")


@contextmanager
def _tells_loss(workers: Workers) -> Iterator[None]:
    """Raises ActorLost for whatever has failed where an actor has died that nobody replaces: it may be a consequence."""
    try:
        yield
    except ActorLost:
        workers.lost()  # waits for the news
        raise
    except Exception as failure:
        if workers.lost():
            raise ActorLost(f"the learner has died: {last_line(failure)}") from failure
        if fleet := workers.exhausted():
            raise ActorLost(f"every replica of the {fleet} fleet has died: {last_line(failure)}", restarted=True) from failure
        raise


@contextmanager
def _tells_what_is_left(console: Console, folder: Path) -> Iterator[None]:
    """Where it fails or is interrupted."""
    try:
        yield
    except BaseException:
        say(console, what_is_left(folder))
        raise


def prepare(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read and tokenise everything; held-out prompts come from a fixed shuffle, so that they stay the same across runs."""
    source = experiment.data
    rows = read_rows(source)
    limits: Any = {"max_response": experiment.max_response, "eos_ids": ends(experiment.student, tokenizer)}
    if isinstance(source, Documents):
        prompts = tokenise_documents(rows, source, tokenizer, **limits)
        reason = f"too short for prompt_tokens {source.prompt_tokens}"
    else:
        prompts = tokenise(rows, source, tokenizer, max_prompt=experiment.max_prompt, **limits)
        reason = f"too long for max_prompt {experiment.max_prompt}"
    vocab_size = vocabulary(experiment, tokenizer)
    _check_ids(prompts, vocab_size, tokenizer)
    left_out = f"data {source.path}: {len(prompts):,} of {len(rows):,} rows are used, the others are {reason}"
    num_held_out = experiment.evaluation.prompts
    if len(prompts) <= num_held_out:
        raise ValueError(
            f"data {source.path} gives {len(prompts)} prompts, evaluation.prompts holds out {num_held_out}: "
            "nothing is left to train on; hold out fewer"
        )
    order = PromptStream(prompts, seed=0).order
    held_out = prompts[order[:num_held_out]]
    answers = [tokenizer.decode(list(prompt.response), skip_special_tokens=True) for prompt in held_out]
    if not any(answers) and any(stage.keep == "rouge_l" for stage in experiment.stages):
        raise ValueError(
            f"a stage keeps the best weights by rouge_l, but none of the {num_held_out} held-out answers has any text"
        )
    text = None
    if experiment.text is not None:
        length = min(experiment.text_length, experiment.max_length)
        chunks = pack_text(read_rows(experiment.text), experiment.text, tokenizer, length=length)
        _check_ids(chunks, vocab_size, tokenizer)
        text = PromptStream(chunks, experiment.seed + 1)
    return Data(
        prompts=PromptStream(prompts[order[num_held_out:]], experiment.seed),
        held_out=held_out,
        decode=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        text=text,
        vocab_size=vocab_size,
        left_out=left_out if len(prompts) < len(rows) else "",
    )


def _check_ids(prompts: Prompts, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a token that student or teacher does not know."""
    if prompts.tokens.max() < vocab_size:
        return
    for prompt in prompts:
        if (largest := max(prompt.tokens + prompt.response)) >= vocab_size:
            raise ValueError(
                f"data {prompt.id} (counted from 0) has the token {tokenizer.convert_ids_to_tokens(largest)}, which student or "
                "teacher does not know; leave it out"
            )


def connect(experiment: Experiment) -> None:
    """Join the cluster of this job or of RAY_ADDRESS, else start a local Ray; raises ValueError when it has too few GPUs."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a job's own PYTHONPATH is part of ours
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # where one rank fails, nobody asks what became of the others
        address = os.environ.get("RAY_ADDRESS", "local")
        # Workers must import the same raykd as the driver, also when it was started by path and not installed.
        env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
        # Nobody is told where the dashboard of a Ray of our own is, and two busy cores are slower by 8 % beside it.
        ours: Any = {"include_dashboard": False} if address == "local" else {}
        _check_listens(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": env}, **ours)
        except ConnectionError as error:
            raise ValueError(f"RAY_ADDRESS {address}: {error}") from error
    available = ray.cluster_resources().get("GPU", 0.0)
    largest = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    for role, amount in experiment.gpus_each().items():
        if amount > largest:
            raise ValueError(
                f"{role} {amount:g} must be on one node, no node of the cluster has more than {largest:g} GPUs; lower it"
            )
    if experiment.gpus() > available:
        raise ValueError(
            f"the experiment asks for {experiment.gpus():g} GPUs (rollout.replicas x gpus + teachers.replicas x gpus + "
            f"learner.ranks x gpus), the cluster has {available:g}; lower them or add nodes"
        )


def _check_listens(address: str) -> None:
    """Raises ValueError where nothing listens at an address of host and port, which Ray would try to reach for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS {address} cannot be reached ({error}): start Ray there, or unset it and a local Ray is started"
        ) from error


def refuse_too_large(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises ValueError for a worker that no GPU or no node of the cluster can hold, or workers that all of them cannot, as far
    as Ray says what types of GPUs there are and how much memory was free on the nodes when it was started."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = [int(resources.get("memory", 0) + resources.get("object_store_memory", 0)) for resources in nodes]
    rooms = [Room("node", max(free), sum(free))] if all(free) else []
    types = [name.partition(":")[2] for resources in nodes for name in resources if name.startswith("accelerator_type:")]
    if largest := gpu_bytes(types):
        rooms.append(Room("GPU", largest, int(largest * sum(resources.get("GPU", 0.0) for resources in nodes))))
    takes = plan(experiment, tokenizer, vocab_size)
    for room in rooms:
        if refusal := takes.refusal(room):
            raise ValueError(refusal)


def idle_gpus(experiment: Experiment) -> str:
    """One sentence where a cluster has GPUs and some worker asks for none; else nothing."""
    available = ray.cluster_resources().get("GPU", 0.0)
    without = [role for role, amount in experiment.gpus_each().items() if not amount]
    if not (available and without):
        return ""
    return (
        f"the cluster has {available:g} GPUs, {', '.join(without)} ask for none: these workers compute on the CPU, an engine of "
        "vLLM for GPUs on one that is not reserved for it; give them GPUs, a share of one will do"
    )
