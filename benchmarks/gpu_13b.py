"""A LLaMA-13B-shaped teacher and a 1.3B student on one large GPU, random weights: scoring, projection, the learner's step.

    python benchmarks/gpu_13b.py                      one GPU of 80 GB or more, bfloat16
    python benchmarks/gpu_13b.py --scale tiny         the same code on two CPU cores, within a minute

No downloads, no Ray, no vLLM: the teacher's worker and one DeepSpeed rank of the learner in one process, as in a run. Tokens are
response tokens for the projection, all positions else. Model flops are those of the products and of causal attention, a
backward pass counting twice; utilisation is of the GPU's data-sheet rate where it is known, else of the largest product's.
"TRL": the step of its DistillationTrainer on the same tokens, teacher's forward pass included, generation left out; it takes
part where it can be imported.
"""

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

import torch
from folders import temporary
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.algorithms import GKD
from raykd.algorithms.base import Needs
from raykd.algorithms.token_divergences import ReverseKL
from raykd.collate import LossTerm
from raykd.experiment import LearnerConfig, Optimiser, TeacherConfig
from raykd.head import Head
from raykd.learner import Learner
from raykd.projection import weighted_loss
from raykd.rank import meeting_place
from raykd.records import Rollout, Row, Source, Totals
from raykd.teacher import Teacher

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 flops a second."""
RESULTS = Path(__file__).parent / "results" / "gpu_13b.json"
REPEATS = 3


@dataclass(frozen=True)
class Scale:
    """The shapes of a measurement."""

    teacher: dict[str, Any]
    student: dict[str, Any]
    vocab_size: int
    batch: int
    prompt: int
    response: int
    dtype: str


def llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """Fields of a Llama configuration."""
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}


SCALES = {
    "13b": Scale(llama(5120, 13824, 40, 40), llama(2048, 5504, 24, 16), 32_000, 16, 256, 512, "bfloat16"),
    "tiny": Scale(llama(128, 344, 4, 4), llama(64, 172, 2, 2), 1000, 4, 16, 32, "float32"),
}


class Bench:
    """Both models and the rows of a step."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.scale, self.device = scale, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher_model, student = (self._random(shape) for shape in (scale.teacher, scale.student))
        student.save_pretrained(folder / "student")
        del student
        self.folder, self.meeting_place = folder, meeting_place("127.0.0.1")
        ids = torch.randint(scale.vocab_size, (scale.batch, scale.prompt + scale.response)).tolist()
        self.rollouts = [
            Rollout(
                prompt_id=str(index),
                sample=0,
                prompt_tokens=tuple(row[: scale.prompt]),
                tokens=tuple(row[scale.prompt :]),
                source=Source.DATASET,
            )
            for index, row in enumerate(ids)
        ]

    def _random(self, shape: dict[str, Any]) -> LlamaForCausalLM:
        config = LlamaConfig(**shape, vocab_size=self.scale.vocab_size, tie_word_embeddings=False, max_position_embeddings=4096)
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.scale.dtype))
        with self.device:
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(default)
        return model

    def start_teacher(self) -> None:
        """Around the model that is there already."""
        dtype: Any = self.scale.dtype
        self.teacher = Teacher(self.teacher_model, TeacherConfig(dtype=dtype), vocab_size=self.scale.vocab_size)

    def score(self) -> dict[str, Any]:
        """The teacher's worker on all responses."""
        self.scores = self.teacher.score(self.rollouts, Needs.DISTRIBUTION)
        positions, responses = self._positions()
        return {"tokens": positions, "flops": self._forward(self.scale.teacher, positions, responses)}

    def projection(self, *, compiled: bool) -> Callable[[], dict[str, Any]]:
        """Reverse KL of two heads, forward and backward."""
        _, count = self._positions()
        width = self.scale.student["hidden_size"]
        dtype = getattr(torch, self.scale.dtype)
        weight = torch.randn(self.scale.vocab_size, width, device=self.device, dtype=dtype).div_(width**0.5).requires_grad_()
        hidden = torch.randn(count, width, device=self.device, dtype=dtype, requires_grad=True)
        states = torch.randn(count, self.scale.teacher["hidden_size"], device=self.device, dtype=dtype)
        tokens = torch.zeros(count, dtype=torch.long, device=self.device)
        weights = torch.full((count,), 1 / count, device=self.device)
        teacher_head = self.teacher.head().to(self.device)

        def project() -> dict[str, Any]:
            hidden.grad = weight.grad = None
            loss, _ = weighted_loss(
                Head(weight=weight),
                hidden,
                tokens,
                weights,
                GKD(divergence=ReverseKL()).per_token,
                vocab_size=self.scale.vocab_size,
                teacher_states=states,
                teacher_head=teacher_head,
                compiled=compiled,
            )
            loss.backward()
            return {"tokens": count, "flops": 2 * count * self.scale.vocab_size * (3 * width + states.shape[1])}

        return project

    def start_learner(self, *, compiled: bool) -> None:
        """One rank, loaded from a folder as in a run."""
        dtype: Any = self.scale.dtype
        saving = self.device.type == "cuda"
        config = LearnerConfig(dtype=dtype, threads=torch.get_num_threads(), activation_checkpointing=saving, compiled=compiled)
        size = self.scale.vocab_size
        address, student = ("127.0.0.1", self.meeting_place.port), str(self.folder / "student")
        head = self.teacher.head()
        self.learner = Learner(student, config=config, rank=0, address=address, vocab_size=size, teacher_head=head)
        self.learner.begin(Optimiser())

    def stop_learner(self) -> None:
        """And give its memory back."""
        self.learner.close()
        del self.learner
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def learn(self) -> dict[str, Any]:
        """One optimiser step."""
        logprobs = [tuple(self.scores.row(index).logprobs.tolist()) for index in range(len(self.rollouts))]
        rows = [
            Row(rollout=rollout, scores=self.scores, index=index, teacher_logprobs=logprobs[index])
            for index, rollout in enumerate(self.rollouts)
        ]
        term = LossTerm(algorithm=GKD(divergence=ReverseKL()), rows=rows, totals=Totals.of(rows))
        self.learner.step([term], 1e-6)
        positions, responses = self._positions()
        rebuilt = 2 * responses * self.scale.vocab_size * self.scale.teacher["hidden_size"]
        return {"tokens": positions, "flops": 3 * self._forward(self.scale.student, positions, responses) + rebuilt}

    def trl(self) -> tuple[float, float]:
        """Median seconds of a step of TRL's DistillationTrainer on these tokens, and the GPU's peak memory in GB."""
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]
        from trl_trainers import Clock

        given = {
            "prompt_ids": [rollout.prompt_tokens for rollout in self.rollouts],
            "completion_ids": [rollout.tokens for rollout in self.rollouts],
        }
        inputs = {name: torch.tensor(rows, device=self.device) for name, rows in given.items()}
        inputs |= {name.replace("ids", "mask"): torch.ones_like(ids) for name, ids in inputs.items()}

        class GivenTokens(DistillationTrainer):
            def _prepare_inputs(self, generation_batch: Any) -> Any:
                return inputs

        clock = Clock(warm_up=1)
        halves = self.scale.dtype == "bfloat16"
        student = LlamaForCausalLM.from_pretrained(self.folder / "student", dtype=torch.float32)
        GivenTokens(
            model=student,
            teacher_model=self.teacher_model,
            args=DistillationConfig(
                output_dir=str(self.folder / "trl"),
                max_steps=REPEATS + 1,
                per_device_train_batch_size=self.scale.batch,
                bf16=halves,
                gradient_checkpointing=halves,
                use_cpu=self.device.type == "cpu",
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"prompt": ["1 2 3"] * 256}),
            processing_class=number_tokenizer(),
            callbacks=[clock],
        ).train()
        return median(clock.seconds["step"][1:]), torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0

    def _positions(self) -> tuple[int, int]:
        """All, and those that predict a response token."""
        return self.scale.batch * (self.scale.prompt + self.scale.response - 1), self.scale.batch * self.scale.response

    def _forward(self, shape: dict[str, Any], positions: int, responses: int) -> float:
        width, layers = shape["hidden_size"], shape["num_hidden_layers"]
        layer = 2 * (4 * width**2 + 3 * width * shape["intermediate_size"])
        attention = 2 * width * (self.scale.prompt + self.scale.response)  # two products, half of each masked
        return positions * layers * (layer + attention) + 2 * responses * self.scale.vocab_size * width


def number_tokenizer() -> Any:
    """TRL wants a tokenizer; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "1": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def timed(phase: Callable[[], dict[str, Any]], rate: float) -> dict[str, float]:
    """Median seconds after a first run, tokens per second, utilisation, and the GPU's peak memory."""
    cuda, seconds, found = torch.cuda.is_available(), [], {}
    for _ in range(REPEATS + 1):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        found = phase()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    taken = median(seconds[1:])
    return {
        "seconds": taken,
        "tokens_per_second": found["tokens"] / taken,
        "utilisation": found["flops"] / taken / rate,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
    }


def flops_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The data sheet's, or that of a large product."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for known, rate in DATA_SHEET.items():
        if known in name:
            return rate
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    started = time.perf_counter()
    (matrix @ matrix).sum().item()
    return 2 * size**3 / (time.perf_counter() - started)


def made(scale_name: str) -> Bench:
    """Models and rows of a scale."""
    torch.manual_seed(0)
    return Bench(SCALES[scale_name], temporary("13b"))


def trl(scale_name: str) -> tuple[float, float]:
    """In a process of its own."""
    return made(scale_name).trl()


def main() -> None:
    """Measure, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="13b")
    scale_name = parser.parse_args().scale
    scale = SCALES[scale_name]
    # A process of its own: it wants the whole GPU, and no process group to find.
    beside = multiprocessing.get_context("spawn").Pool(1).apply(trl, (scale_name,)) if find_spec("trl") else None
    bench = made(scale_name)
    rate = flops_rate(bench.device, getattr(torch, scale.dtype))
    bench.start_teacher()
    rows = {"score": timed(bench.score, rate), "projection": timed(bench.projection(compiled=False), rate)}
    if which("cc"):
        rows["projection, compiled"] = timed(bench.projection(compiled=True), rate)
    for compiled in (False, True) if which("cc") else (False,):
        bench.start_learner(compiled=compiled)
        rows["learner step, compiled" if compiled else "learner step"] = timed(bench.learn, rate)
        bench.stop_learner()
    if beside is not None:
        tokens = scale.batch * (scale.prompt + scale.response - 1) / beside[0]
        rows["TRL: score and learn"] = {"seconds": beside[0], "tokens_per_second": tokens, "peak_gigabytes": beside[1]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shown = Table("", "seconds", "tokens/s", "utilisation", "peak GB", caption=f"{scale_name} on {device}")
    for name, row in rows.items():
        used = f"{row['utilisation']:.0%}" if "utilisation" in row else ""
        shown.add_row(name, f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}", used, f"{row['peak_gigabytes']:.1f}")
    Console().print(shown)
    if scale_name != "tiny":
        RESULTS.parent.mkdir(exist_ok=True)
        found = {"measured": stamp(), "device": device, "flops_per_second": rate, "rows": rows}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
