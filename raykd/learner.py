"""One DeepSpeed rank: rows of the replay buffer in, weights out. A plain class; nothing here knows who calls it.

    learner = Learner(folder, config=config, rank=rank, address=address, vocab_size=V, teacher_head=head, fetch=ray.get)
    learner.begin(optimiser)                                # a stage: AdamW starts afresh; tune(optimiser) keeps its moments
    metrics = learner.step(terms, learning_rate)            # terms: list of LossTerm, this rank's rows
    update = learner.publish(version)                       # a WeightUpdate on rank 0, None elsewhere
    learner.save(folder); learner.restore(folder); learner.save_student(folder); learner.close()

Every verb is collective: all ranks call it, in the same order. Importing this module does not import DeepSpeed.
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raykd.between_nodes import Window
from raykd.collate import Fetch, LossTerm, MicroBatch, collate, micro_batches
from raykd.experiment import LearnerConfig, Optimiser
from raykd.fragments import State, read, write
from raykd.fused import fuse
from raykd.gpu_sharing import gpu_uuid
from raykd.head import Head
from raykd.rank import SteadyAdamW, connect, deepspeed_config, zero_stage
from raykd.records import Row
from raykd.student import Student
from raykd.weights import Shelves, WeightUpdate, grouped

LATEST = "latest"
"""The file naming the newest complete checkpoint of a folder."""


class Learner:
    """Steps on the sum of its loss terms.

    The gradient is that of the sum over all ranks and micro-batches, exactly: denominators are global, and DeepSpeed's averaging
    is undone. A step whose loss or gradient norm is not finite, or whose norm is absurd, changes nothing and counts as skipped.
    """

    def __init__(
        self,
        model: str,
        *,
        config: LearnerConfig,
        rank: int,
        address: tuple[str, int],
        vocab_size: int,
        teacher_head: Head | None = None,
        fetch: Fetch = lambda block: block,
    ) -> None:
        self.config, self.rank = config, rank
        self._vocab_size, self._fetch = vocab_size, fetch
        torch.set_num_threads(config.threads)
        self.device = connect(rank, config.ranks, address, config.deadline_s)
        self._student = Student(
            model,
            dtype=getattr(torch, config.dtype),
            vocab_size=vocab_size,
            chunk=config.chunk,
            compiled=self.device.type == "cuda" if config.compiled is None else config.compiled,
            teacher_head=None if teacher_head is None else teacher_head.to(self.device),
            sharded=zero_stage(config) == 3,
            activation_checkpointing=config.activation_checkpointing,
            lora=config.lora,
        )
        self._student.to(self.device)
        fuse(self._student.model)
        self._teacher_head = self._student.output.teacher_head()  # what was given may be kept in another form
        self._optimiser, self._skipped_in_a_row = Optimiser(), 0
        self._engine: Any = self._start_engine()  # DeepSpeed has no usable annotations
        self._sharded_optimiser: Any = self._engine.optimizer if zero_stage(config) else None
        self._state = self._student.state()
        self._shelves = Shelves()

    def _start_engine(self) -> Any:
        """The student and its optimiser in DeepSpeed's hands."""
        import deepspeed

        if self.device.type == "cpu":  # its shared-memory collectives need a compiler, and hang between ranks on different nodes
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        adam = SteadyAdamW((p for p in self._student.parameters() if p.requires_grad), self._absurd)
        with redirect_stdout(None):  # its bfloat16 optimiser prints the memory use
            engine, *_ = deepspeed.initialize(model=self._student, optimizer=adam, config=deepspeed_config(self.config))
        # DeepSpeed makes a group of its own, without a deadline: NCCL's would be ten minutes.
        group: Any = deepspeed.utils.groups._get_data_parallel_group()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.config.deadline_s), group)
        if self.config.ranks == 1 and not zero_stage(self.config):
            engine.enable_backward_allreduce = False  # the gradients of a single rank would be copied there and back
        return engine

    def begin(self, optimiser: Optimiser) -> None:
        """Start a stage: AdamW's moments are zero again and its hyper-parameters those given."""
        for state in self._engine.basic_optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.tune(optimiser)

    def tune(self, optimiser: Optimiser) -> None:
        """Go on with other hyper-parameters and the same moments."""
        for group in self._engine.basic_optimizer.param_groups:
            group.update(betas=optimiser.betas, eps=optimiser.eps, weight_decay=optimiser.weight_decay)
        self._optimiser, self._skipped_in_a_row = optimiser, 0
        if self._sharded_optimiser is not None:
            self._sharded_optimiser.clip_grad = optimiser.gradient_clip

    def step(self, terms: Sequence[LossTerm], learning_rate: float) -> dict[str, float]:
        """One optimiser step. Returns this rank's shares of every metric: summed over ranks they are the step's values."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        schedule = self._schedule(terms)
        metrics = _Sums()
        finite = torch.ones((), device=self.device)
        for index, (term, rows) in enumerate(schedule):
            last = index == len(schedule) - 1
            self._engine.set_gradient_accumulation_boundary(last)
            loss, term_metrics = self._engine(micro=self._collate(rows, term), algorithm=term.algorithm)
            loss = loss * term.weight
            finite = finite * torch.isfinite(loss.detach())
            if last:  # all ranks agree to spoil the gradient, and DeepSpeed drops a step whose gradient norm is not finite
                dist.all_reduce(finite, op=dist.ReduceOp.MIN)
                loss = loss * torch.where(finite.bool(), 1.0, torch.nan)
            metrics.add(_prefix(terms, term), term_metrics, loss.detach())
            self._engine.backward(loss * self.config.ranks)  # DeepSpeed divides by the ranks
        norm = self._update()
        skipped = not norm <= self._optimiser.gradient_limit
        self._count(skipped, norm)
        finite_norm = norm if math.isfinite(norm) else 0.0
        leader = {"grad_norm": finite_norm, "learning_rate": learning_rate, "skipped": float(skipped)}
        return metrics.values() | (leader if self.rank == 0 else {})

    @torch.no_grad()
    def evaluate(self, terms: Sequence[LossTerm]) -> dict[str, float]:
        """The same metrics without a step."""
        metrics = _Sums()
        for term, rows in self._schedule(terms):
            loss, term_metrics = self._engine(micro=self._collate(rows, term), algorithm=term.algorithm)
            metrics.add(_prefix(terms, term), term_metrics, loss * term.weight)
        return metrics.values()

    @property
    def gpu(self) -> str | None:
        """UUID of this rank's GPU, None on CPU."""
        return gpu_uuid(self.device)

    def publish_on_gpu(self) -> None:
        """From now on ``publish`` leaves the weights in this rank's GPU memory: for readers that are all on this GPU."""
        self._shelves = Shelves(self.device)

    def publish_between_nodes(self) -> None:
        """From now on other nodes can read what ``publish`` leaves in this node's memory, through NIXL."""
        self._shelves = Shelves(window=Window())

    def publish(self, version: int, held: Collection[int] = ()) -> WeightUpdate | None:
        """Copy the weights to memory that this node shares, named as in their checkpoint, tied ones once; all ranks gather, rank
        0 copies. The versions ``held`` stay what they are, others may be written over."""
        groups = self._gathered()
        if self.rank == 0:
            whole = {name: _without_values(self._state[name]) for name in self._distinct()}
            sizes = [tensor.nbytes for tensor in self._student.as_in_checkpoint(whole).values()]
            published = ([*self._student.as_in_checkpoint(dict(group)).items()] for group in groups)
            return self._shelves.publish(version, published, sizes, held)
        for _ in groups:  # gathered with the others
            pass
        return None

    def save(self, folder: Path | str) -> None:
        """Weights and optimiser state of every rank. The folder's ``latest`` names the new checkpoint only once all of it is
        written, and then the one before is removed."""
        folder = Path(folder)
        before = (folder / LATEST).read_text() if (folder / LATEST).exists() else None
        tag = f"checkpoint-{int(before.rpartition('-')[2]) + 1 if before else 0}"
        if self.rank == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)  # what a crash has left, perhaps of more ranks
            (folder / tag).mkdir(parents=True)
        dist.barrier()
        state = self._learned()
        write(folder / tag, self.rank, state.written())
        dist.barrier()
        if self.rank == 0:
            described = self._described() | {"steps": state.steps, "optimiser": self._optimiser.model_dump(mode="json")}
            (folder / tag / "learner.json").write_text(json.dumps(described))
            (folder / f"{LATEST}.partial").write_text(tag)
            os.replace(folder / f"{LATEST}.partial", folder / LATEST)
            if before:
                shutil.rmtree(folder / before)
        dist.barrier()

    def restore(self, folder: Path | str) -> None:
        """Continue from the newest complete checkpoint of a folder, which any number of ranks has written, at any ZeRO stage."""
        folder = Path(folder)
        if not (folder / LATEST).exists():
            raise ValueError(f"{folder} holds no complete checkpoint: it has no file named {LATEST}")
        tag = (folder / LATEST).read_text()
        written, own = json.loads((folder / tag / "learner.json").read_text()), self._described()
        if written["parameters"] != own["parameters"]:
            raise ValueError(f"{folder / tag} is of another student: its parameters have other names or sizes; name the same one")
        if written["lora"] != own["lora"]:
            raise ValueError(
                f"{folder / tag} was written with lora {written['lora']}, this learner has {own['lora']}; use the same"
            )
        state = self._learned()
        read(folder / tag, state.fragments())
        state.restored(written["steps"])
        self.tune(Optimiser(**written["optimiser"]))

    def save_student(self, folder: Path | str) -> None:
        """Write a plain Hugging Face folder (safetensors, configuration), whatever the ZeRO stage."""
        weights: dict[int, Tensor] = {}
        for named_tensors in self._gathered():
            if self.rank == 0:
                weights.update({id(self._state[name]): tensor.cpu().clone() for name, tensor in named_tensors})
        if self.rank == 0:
            with self._student.saved_config():
                self._student.model.save_pretrained(
                    folder, state_dict={name: weights[id(tensor)] for name, tensor in self._state.items()}
                )
        dist.barrier()

    def close(self) -> None:
        """Free the engine. The process group stays until the process ends: DeepSpeed keeps groups of its own on top of it."""
        self._engine.destroy()

    def _schedule(self, terms: Sequence[LossTerm]) -> list[tuple[LossTerm, list[Row]]]:
        """The micro-batches of a step, as many on every rank: one with fewer rows runs empty ones."""
        batches = [micro_batches(term.rows, self.config.micro_batch, self._student.lay) for term in terms]
        counts = torch.tensor([len(of_term) for of_term in batches], device=self.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        if not counts.any():
            raise ValueError("a step needs at least one row on one rank; all terms are empty")
        return [
            (term, of_term[index] if index < len(of_term) else [])
            for term, of_term, count in zip(terms, batches, counts.tolist(), strict=True)
            for index in range(count)
        ]

    def _collate(self, rows: Sequence[Row], term: LossTerm) -> MicroBatch:
        return collate(
            rows,
            term.algorithm,
            term.totals,
            fetch=self._fetch,
            teacher_head=self._teacher_head,
            vocab_size=self._vocab_size,
            lay=self._student.lay,
            device=self.device,
        )

    def _update(self) -> float:
        """Clip and step, and return the gradient norm; where that is not finite or absurd, drop the gradient."""
        if self._sharded_optimiser is not None:
            self._engine.step()
            if self._engine.was_step_applied():
                return float(self._engine.get_global_grad_norm())
            if self.config.offload_optimiser and zero_stage(self.config) < 3:
                # DeepSpeed 0.19 forgets this gradient only where nothing is offloaded: the next would be added to it.
                kept = self._sharded_optimiser.averaged_gradients
                kept.update(dict.fromkeys(kept))
            return math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._student.parameters(), self._optimiser.gradient_clip))
        if norm <= self._optimiser.gradient_limit:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def _absurd(self) -> bool:
        """Under ZeRO, between the norm of the gradient and the optimiser's step: whether that must not be made."""
        return self._sharded_optimiser is not None and (
            self._sharded_optimiser._global_grad_norm > self._optimiser.gradient_limit
        )

    def _count(self, skipped: bool, norm: float) -> None:
        """Raises FloatingPointError after ``max_skipped`` skipped steps in a row: on all ranks, since all see the same norm."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= self._optimiser.max_skipped:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row were skipped, the last with gradient norm {norm:g}: lower the learning "
                f"rate, look at the data, or raise gradient_limit {self._optimiser.gradient_limit:g}"
            )

    def _learned(self) -> State:
        return State(self._engine, {name: p for name, p in self._student.named_parameters() if p.requires_grad})

    def _described(self) -> dict[str, Any]:
        """What must be equal where a checkpoint is written and where it is read."""
        shapes = {name: [*getattr(tensor, "ds_shape", tensor.shape)] for name, tensor in self._state.items()}
        digest = blake2b(json.dumps(shapes).encode(), digest_size=16).hexdigest()
        return {"parameters": digest, "lora": self.config.lora.adapters}

    def _distinct(self) -> list[str]:
        """Names of parameters and buffers, of tied ones the first."""
        first_names = {id(tensor): name for name, tensor in reversed(self._state.items())}
        return [*reversed(first_names.values())]

    def _gathered(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Parameters and buffers in groups, whole while a group is held; tied ones once."""
        from deepspeed.runtime.zero import GatheredParameters

        for group in grouped({name: _without_values(self._state[name]).nbytes for name in self._distinct()}):
            parts = [part for name in group for part in self._student.parts(name)]
            with GatheredParameters([part for part in parts if hasattr(part, "ds_id")]):
                yield [(name, self._student.whole(name)) for name in group]


class _Sums:
    """Metrics added up on the device, read once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, prefix: str, metrics: dict[str, Tensor], loss: Tensor) -> None:
        for name, value in {**{prefix + name: value for name, value in metrics.items()}, "loss": loss}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()

    def values(self) -> dict[str, float]:
        return dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))


def _prefix(terms: Sequence[LossTerm], term: LossTerm) -> str:
    """The first term's metrics keep their names; those of others carry the algorithm's."""
    return "" if term is terms[0] else f"{type(term.algorithm).__name__.lower()}/"


def _without_values(tensor: Tensor) -> Tensor:
    """Shape and dtype of the whole tensor, also where this rank holds only its ZeRO-3 part."""
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
