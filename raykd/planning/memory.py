"""What an experiment takes, before it starts: the memory of every worker, the bytes that travel and those that are stored.

Nothing is loaded. The P parameters are counted on models without memory, made from their configurations; T of them are learned.
A learner rank, one of R, keeps of weights of b bytes a number:

    weights               b P       over R at ZeRO stage 3
    gradients             4 T       over R from stage 2 on
    AdamW                 12 T      float32 weights and two moments; over R from stage 1 on; at stage 0 the moments alone
    the teacher's head              over R at stage 3

What comes and goes is an estimate: gradients before they are float32 and shared, layers that are gathered, and what the backward
pass needs of the longest texts. The tests compare both with what DeepSpeed's ranks hold.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.filesize import decimal
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from raykd.experiment import Experiment, LearnerConfig, Model, Stage
from raykd.models import config_of
from raykd.payloads import chosen_payload, payload_bytes
from raykd.planning.durations import durations
from raykd.planning.size import BYTES, Size
from raykd.pretrained import locate
from raykd.projection import SIZES
from raykd.rank import REDUCE_BUCKET, zero_stage

PROBE = 8
"""Bytes of a response token's probe."""
OF_A_LOGIT = 12
"""Bytes in a chunk of distributions: of student and teacher in float32, and a slope."""
GATHERED = 1_000_000_000
"""Parameters that DeepSpeed has whole at the same time under ZeRO-3, at most: its default."""
GPU_GIB = {"T4": 16, "A10G": 24, "L4": 24, "V100": 32, "L40S": 48, "A100": 80, "H100": 94, "H200": 141, "B200": 192}
"""Memory by the names that Ray gives to the types of accelerators; of variants the largest, by their data sheets."""


class Part(NamedTuple):
    """Something that takes memory."""

    name: str
    bytes: int
    estimated: bool = False

    @classmethod
    def of(cls, model: Size, name: str, dtype: str, parallel: int = 1) -> "Part":
        """A frozen model's weights, of which a GPU has one of ``parallel`` parts."""
        return cls(name, model.weight_bytes(dtype, parallel), estimated=model.stored == 0)


class Room(NamedTuple):
    """Memory of a cluster."""

    of: str
    """What has it: GPU, or node."""
    largest: int
    together: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What each of some workers holds on its device."""

    role: str
    count: int
    gpus: float
    parts: tuple[Part, ...]
    remedy: str
    """What makes it smaller."""
    offloaded: tuple[Part, ...] = ()
    """What it holds in its node's memory though it is on a GPU."""

    def bytes(self) -> int:
        """Of all parts on its device."""
        return sum(part.bytes for part in self.parts)

    def certain(self, room: Room) -> dict[str, int]:
        """Bytes of the parts that are no estimates and lie in such memory."""
        on_gpu, on_node = (self.parts, self.offloaded) if self.gpus else ((), self.parts)
        return {part.name: part.bytes for part in (on_gpu if room.of == "GPU" else on_node) if not part.estimated}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run takes."""

    workers: tuple[Worker, ...]
    notes: tuple[str, ...]
    """What travels, what is stored and how long it takes, a sentence each."""

    def refusal(self, room: Room) -> str:
        """Why a run cannot be where there is so much memory, as far as that is certain; else nothing."""
        held = [(worker, parts) for worker in self.workers if (parts := worker.certain(room))]
        offers = "has" if room.of == "GPU" else "had, free when Ray was started,"
        for worker, parts in held:
            if (needed := sum(parts.values())) > room.largest:
                largest = max(parts, key=parts.__getitem__)
                return (
                    f"a {worker.role} needs {decimal(needed)} on its {room.of}, {decimal(parts[largest])} of it for {largest}, "
                    f"and the largest {room.of} of the cluster {offers} {decimal(room.largest)}; {worker.remedy}"
                )
        shares = {f"{worker.count} x {worker.role}": worker.count * sum(parts.values()) for worker, parts in held}
        if (together := sum(shares.values())) > room.together:
            each = ", ".join(f"{who} {decimal(share)}" for who, share in shares.items())
            offload = ", learner.offload_optimiser" * (room.of == "GPU")
            return (
                f"the workers need {decimal(together)} of {room.of} memory together ({each}), the cluster {offers} "
                f"{decimal(room.together)}; use more {room.of}s, smaller models{offload}, or learner.lora.rank"
            )
        return ""

    def table(self) -> Table:
        """The workers, for people to read."""
        table = Table("workers", "memory each", "of it (~: an estimate)", box=None, padding=(0, 2, 0, 0))
        for worker in self.workers:
            parts = (f"{part.name} {'~' * part.estimated}{decimal(part.bytes)}" for part in worker.parts)
            where = f"{worker.gpus:g} GPU" if worker.gpus else "CPU"
            table.add_row(f"{worker.count} x {worker.role}, {where}", f"~{decimal(worker.bytes())}", ", ".join(parts))
        return table


def plan(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, vocab_size: int, gpu: str = "") -> Plan:
    """What ``experiment`` takes, on GPUs of the kind ``gpu`` also how long; ``tokenizer``: the student's, ``vocab_size``: what it
    shares with the teacher's. ValueError where a model cannot be found, or that kind is not known."""
    student = Size.of(config_of("student", experiment.student, tokenizer), experiment.learner.lora)
    teacher = _teacher_size(experiment.teacher, tokenizer) if experiment.teacher else None
    workers = [_learner(experiment, student, teacher, vocab_size)]
    if teacher is not None:
        workers.append(_teacher(experiment, teacher))
    if experiment.num_rollouts:
        workers.append(_rollout(experiment, student))
    notes = [*_notes(experiment, student, teacher, vocab_size)]
    notes += durations(experiment, student, teacher, vocab_size, gpu) if gpu else []
    return Plan(workers=tuple(workers), notes=tuple(notes))


def gpu_bytes(accelerators: Iterable[str]) -> int | None:
    """Memory of the largest GPU of a cluster with these types; None where one is unknown, or there is none."""
    known = [GPU_GIB.get(accelerator, 0) for accelerator in accelerators]
    return max(known) * 2**30 if known and all(known) else None


def _teacher_size(model: Model, tokenizer: PreTrainedTokenizerBase) -> Size:
    config = config_of("teacher", model, tokenizer)
    size = Size.of(config)
    if not getattr(config, "quantization_config", None):
        return size
    files = Path(locate("teacher.path", model.path)).glob("*.safetensors")  # none where it is a name on the Hub
    return replace(size, stored=sum(file.stat().st_size for file in files))


def _learner(experiment: Experiment, student: Size, teacher: Size | None, vocab_size: int) -> Worker:
    config, stage = experiment.learner, zero_stage(experiment.learner)
    number = BYTES[config.dtype]
    offloaded = config.offload_optimiser and config.gpus

    def share(amount: int, *, from_stage: int) -> int:
        return amount // config.ranks if stage >= from_stage else amount

    head = BYTES[experiment.teachers.dtype] * vocab_size * teacher.width if teacher else 0
    longest = config.micro_batch * experiment.max_length
    layers = student.layers * student.width + student.kept if config.activation_checkpointing else student.layers * student.kept
    parts = [
        Part("weights", share(number * student.parameters, from_stage=3)),
        Part("gradients", share(4 * student.learned, from_stage=2)),
        Part("AdamW", 0 if offloaded else share((12 if stage else 8) * student.learned, from_stage=1)),
        Part("the teacher's head", share(head, from_stage=3)),
        Part("gradients on their way", _on_their_way(config, student), estimated=True),
        Part("activations", number * longest * layers, estimated=True),
        Part("distributions", OF_A_LOGIT * min(min(config.chunk, longest) * vocab_size, SIZES["cuda"].chunk), estimated=True),
    ]
    aside = (Part("AdamW", 12 * student.learned // config.ranks),) if offloaded else ()
    offload = ", learner.offload_optimiser" * bool(config.gpus and not offloaded)
    remedy = f"use more learner.ranks with learner.zero_stage 3{offload}, or learner.lora.rank"
    return replace(_worker("learner rank", config.ranks, config.gpus, parts, remedy), offloaded=aside)


def _on_their_way(config: LearnerConfig, student: Size) -> int:
    """Bytes of gradients before they are where they belong, and under ZeRO-3 of the layers that are whole meanwhile."""
    stage, number, learned = zero_stage(config), BYTES[config.dtype], student.learned
    if stage == 0:
        return 4 * learned * (config.ranks > 1)
    if stage == 1:
        return (4 + 2 * (config.ranks > 1)) * learned
    bucket = number * (REDUCE_BUCKET + min(learned, REDUCE_BUCKET))
    return bucket if stage == 2 else bucket + 2 * number * min(student.parameters, GATHERED)


def _teacher(experiment: Experiment, teacher: Size) -> Worker:
    config, engine = experiment.teachers, experiment.teachers.engine
    by_vllm = config.backend == "vllm"
    parts = [Part.of(teacher, "weights", config.dtype, engine.tensor_parallel if by_vllm else 1)]
    if not by_vllm:
        parts.append(Part("activations", BYTES[config.dtype] * config.batch_tokens * teacher.kept, estimated=True))
    if experiment.teacher_writes:
        parts.append(Part.of(teacher, "weights of the engine that writes", engine.dtype, engine.tensor_parallel))
    if not config.gpus:
        parts.append(Part("KV cache", int(engine.cpu_cache_gib * 2**30) * (experiment.teacher_writes + by_vllm)))
    remedy = "set teachers.backend to vllm and raise teachers.engine.tensor_parallel, or name a quantised checkpoint"
    return _worker("teacher", config.replicas, config.gpus, parts, remedy)


def _rollout(experiment: Experiment, student: Size) -> Worker:
    config, engine = experiment.rollout, experiment.rollout.engine
    parts = [Part.of(student, "weights", engine.dtype, engine.tensor_parallel)]
    if not config.gpus:
        parts.append(Part("KV cache", int(engine.cpu_cache_gib * 2**30)))
    return _worker("rollout engine", config.replicas, config.gpus, parts, "raise rollout.engine.tensor_parallel")


def _worker(role: str, count: int, gpus: float, parts: Iterable[Part], remedy: str) -> Worker:
    return Worker(role=role, count=count, gpus=gpus, parts=tuple(part for part in parts if part.bytes), remedy=remedy)


def _notes(experiment: Experiment, student: Size, teacher: Size | None, vocab_size: int) -> Iterator[str]:
    learner, rollout, teachers = experiment.learner, experiment.rollout, experiment.teachers
    weights = BYTES[learner.dtype] * student.parameters
    if gpus := experiment.gpus():
        yield f"{gpus:g} GPUs"
    engines = {"rollout": rollout} if experiment.num_rollouts else {}
    engines |= {"teachers": teachers} if experiment.teacher_starts_vllm else {}
    for name, replicas in engines.items():
        if replicas.gpus:
            yield f"{name}.engine.memory {replicas.engine.memory:g} of its GPU is an engine's: weights and, in the rest, KV cache"
    if learner.offload_optimiser and learner.gpus:
        yield f"AdamW is in the memory of the machines: {decimal(12 * student.learned)} of all ranks together"
    if experiment.num_rollouts:
        yield (
            f"new weights are {decimal(weights)} for each of {rollout.replicas} rollout engines; two versions stay in the memory "
            "of learner rank 0's node, or of its GPU where all engines are on it"
        )
    if teacher is not None:
        for index, stage in enumerate(experiment.stages):
            if stage.algorithm.needs.distribution:
                yield f"stages.{index}: {_scores(experiment, stage, teacher, vocab_size)}"
    yield "beside that a process has its libraries, about 0.6 GB of the machine's memory, 2.4 GB where vLLM is one of them"
    kept = "all" if experiment.checkpoints_kept is None else experiment.checkpoints_kept
    yield (
        f"a checkpoint is {decimal(12 * student.learned)} on disk, {kept} are kept, and one more while it is written; the "
        f"student is {decimal(weights)}"
    )


def _scores(experiment: Experiment, stage: Stage, teacher: Size, vocab_size: int) -> str:
    teachers, top_k = experiment.teachers, None if stage.algorithm.needs.sampled else stage.algorithm.top_k
    sizes = payload_bytes(teacher.width, vocab_size, getattr(torch, teachers.dtype), top_k)
    payload = chosen_payload(teachers.payload, sizes)
    token = sizes[payload] + PROBE
    rows = max(stage.rows_per_phase * (stage.max_staleness + 1), stage.bounds.capacity)
    most = decimal(token * rows * experiment.max_response)
    return f"the scores of a response token are {token:,} bytes ({payload}); Ray's object stores hold at most {most} of them"
