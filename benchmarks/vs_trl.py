"""On-policy distillation beside TRL's DistillationTrainer and GKDTrainer: seconds and memory of a step, phase by phase.

    python benchmarks/vs_trl.py [--dtype bfloat16] [check floor raykd compiled overlap distillation distillation_vllm gkd ...]

Student 16M, teacher 53M (random-weight Llamas), GPT-2's tokenizer and vocabulary of 50,257, two threads; 8 prompts of 32 tokens,
128 new tokens each, reverse KL, AdamW. The prompts are of one length, so that nobody computes padding. Checkpoints are float32 or
bfloat16; then TRL runs with its default ``bf16=True`` and steps bfloat16 weights, ours keeps float32 master weights. Every
contender is a process of its own, given the same models and prompts; ours is ``run(Experiment)`` with its actors, "compiled" the
same with ``learner.compiled``, "overlap" also with ``max_staleness`` 1 and one thread for the learner and for the engine that
writes. "distillation" writes with transformers, TRL's default, "distillation_vllm" with vLLM in its own process
(``use_vllm=True, vllm_mode="colocate"``). All have the settings of the C library that our actors have. Medians of the steps after
the first three. Memory is the high-water mark of resident memory of the process that learns; for ours also the sum over driver
and actors, each with its own copy of the libraries (0.5 to 0.9 GB), shared pages counted in each; Ray's own processes are not.

"check": all three give the same loss and gradient on the same samples of unequal length; in bfloat16 they are compared with what
ours computes from the same weights in float32. "floor": the matrix products of a step, each once, as if they ran at the rate of
this machine's fastest product, or that of reading the weights where that takes longer.

TRL takes part where it can be imported: ``pip install --no-deps trl==1.16.0 accelerate``. RAYKD_DATA names the folder that holds
``models/gpt2-tokenizer`` and TinyStories (default ../shared).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl_trainers import Clock, distillation_trainer, gkd_trainer

from raykd.fleet import HEAP

SHAPES: dict[str, dict[str, Any]] = {
    "student": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "teacher": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}
DATA = Path(os.environ.get("RAYKD_DATA", "../shared"))
TOKENIZER = DATA / "models/gpt2-tokenizer"
STORIES = DATA / "data/corpus_tinystories/tinystories_cased.jsonl.gz"
BATCH, PROMPT, RESPONSE, THREADS = 8, 32, 128, 2
STEPS = {"raykd": 13, "distillation": 8, "gkd": 8}
WARM_UP = 3
VLLM_ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29879",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""What TRL's trainer wants for a vLLM in its own process, and as ours has it: not bound to cores."""
RATE = 1e-5
TRL: dict[str, Any] = {"batch": BATCH, "rate": RATE, "max_new_tokens": RESPONSE}
RESULTS = Path(__file__).parent / "results" / "vs_trl.json"


TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative, of loss and gradient norm."""


def prepare(folder: Path, dtype: str = "float32") -> None:
    """Both models and the prompts. The final norms are scaled so that the distributions are not flat."""
    from raykd.prompts import Documents, read_rows, tokenise_documents

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        eos = tokenizer.eos_token_id
        config = LlamaConfig(**shape, vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=eos, eos_token_id=eos)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.model.norm.weight.mul_(8)
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    source = Documents(path=str(STORIES), prompt_tokens=PROMPT, limit=1000)
    prompts = tokenise_documents(read_rows(source), source, tokenizer, max_response=1)
    texts = (tokenizer.decode(prompt.tokens) for prompt in prompts)
    same = [text for text in texts if len(tokenizer(text).input_ids) == PROMPT]
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in same[: BATCH * max(STEPS.values())])


def dtype_of(folder: Path) -> str:
    """The models' own."""
    return str(AutoConfig.from_pretrained(folder / "student").dtype).removeprefix("torch.")


def raykd(folder: Path, max_staleness: int = 0, threads: int = THREADS, compiled: bool = False) -> dict[str, Any]:
    """The product's own run. ``threads``: of the learner and of the engine that writes."""
    from raykd.algorithms import GKD
    from raykd.algorithms.token_divergences import ReverseKL
    from raykd.experiment import (
        EngineConfig,
        EvaluationConfig,
        Experiment,
        LearnerConfig,
        Model,
        Optimiser,
        RolloutConfig,
        Stage,
        TeacherConfig,
        TrackingConfig,
    )
    from raykd.prompts import Pairs
    from raykd.run import run

    dtype: Any = dtype_of(folder)
    engine = EngineConfig(dtype=dtype, threads=threads)
    stage = Stage(
        algorithm=GKD(divergence=ReverseKL()),
        steps=STEPS["raykd"],
        batch_size=BATCH,
        max_staleness=max_staleness,
        optimiser=Optimiser(learning_rate=RATE),
    )
    experiment = Experiment(
        name="vs-trl",
        student=Model(path=str(folder / "student")),
        teacher=Model(path=str(folder / "teacher")),
        data=Pairs(path=str(folder / "prompts.jsonl"), response=None),
        stages=(stage,),
        max_prompt=PROMPT,
        max_response=RESPONSE,
        rollout=RolloutConfig(engine=engine),
        teachers=TeacherConfig(dtype=dtype, engine=engine, threads=THREADS),
        learner=LearnerConfig(dtype=dtype, threads=threads, compiled=compiled),
        evaluation=EvaluationConfig(prompts=0),
        tracking=TrackingConfig(wandb=False),
        runs=folder / "runs",
    )
    result = run(experiment)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    verbs = ("generate", "score", "learn", "publish", "load", "wait")
    return {
        "step": [line["seconds"] - before["seconds"] for before, line in pairwise(lines)][WARM_UP - 1 :],
        "tokens": [BATCH * line["response_length"] for line in lines][WARM_UP:],
        **{verb: [line.get(f"seconds/{verb}", 0.0) for line in lines][WARM_UP:] for verb in verbs},
    }


def compiled(folder: Path) -> dict[str, Any]:
    """``learner.compiled``."""
    return raykd(folder, compiled=True)


def overlap(folder: Path) -> dict[str, Any]:
    """The next responses are written while the learner learns, each by a thread; the teacher, whose work comes in bursts, has
    two. Compiled, too."""
    return raykd(folder, max_staleness=1, threads=1, compiled=True)


def distillation(folder: Path) -> dict[str, Any]:
    """TRL's DistillationTrainer."""
    clock = Clock(WARM_UP)
    distillation_trainer(folder, clock, STEPS["distillation"], **TRL).train()
    return clock.result()


def distillation_vllm(folder: Path) -> dict[str, Any]:
    """TRL's DistillationTrainer, whose responses vLLM writes."""
    os.environ.update(VLLM_ALONE)
    clock = Clock(WARM_UP)
    distillation_trainer(folder, clock, STEPS["distillation"], **TRL, by_vllm=True).train()
    return clock.result()


def gkd(folder: Path) -> dict[str, Any]:
    """TRL's GKDTrainer."""
    clock = Clock(WARM_UP)
    gkd_trainer(folder, clock, STEPS["gkd"], **TRL).train()
    return clock.result()


def floor(folder: Path) -> dict[str, Any]:
    """Nothing but the matrix products of a step, each once, at this machine's rates."""
    dtype = getattr(torch, dtype_of(folder))
    flops, bytes_read = _rates(dtype)
    head = {name: 50_257 * SHAPES[name]["hidden_size"] for name in SHAPES}
    body = {name: sum(m * n for m, n in _matrices(SHAPES[name])) for name in SHAPES}
    written, length = BATCH * RESPONSE, BATCH * (PROMPT + RESPONSE - 1)

    def seconds(numbers: int, rows: int) -> float:
        """Of a product of ``rows`` states and matrices of so many numbers."""
        return max(2 * numbers * rows / flops, numbers * dtype.itemsize / bytes_read)

    decoding = (RESPONSE - 1) * seconds(body["student"] + head["student"], BATCH)
    phases = {
        "generate": seconds(body["student"], BATCH * PROMPT) + seconds(head["student"], BATCH) + decoding,
        "score": seconds(body["teacher"], length),
        "learn": 3 * seconds(body["student"], length) + 3 * seconds(head["student"], written) + seconds(head["teacher"], written),
    }
    return {"step": [sum(phases.values())], **{name: [value] for name, value in phases.items()}, "tokens": [written]}


def _rates(dtype: torch.dtype) -> tuple[float, float]:
    """The most flops a second of a product of the sizes at hand, and bytes a second of reading: the best of several."""

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    torch.manual_seed(0)
    most = 0.0
    for rows, inputs, outputs in ((1024, 512, 1536), (1280, 256, 688), (256, 512, 50_257), (2048, 2048, 2048)):
        first, second = torch.randn(rows, inputs, dtype=dtype), torch.randn(inputs, outputs, dtype=dtype)
        most = max(most, 2 * rows * inputs * outputs / best(partial(torch.mm, first, second)))
    numbers = torch.ones(2**26)
    return most, numbers.nbytes / best(numbers.sum)


def _matrices(shape: dict[str, Any]) -> list[tuple[int, int]]:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    layer = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return layer * shape["num_hidden_layers"]


def check(folder: Path) -> dict[str, Any]:
    """Losses and gradient norms of all three on the same tokens, responses of 5 to 40 tokens after prompts of 3 to 17."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 40), (17, 5), (9, 23), (12, 31)]
    texts = [[torch.randint(50_257, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    longest = [max(pair[side] for pair in lengths) for side in range(2)]

    def padded(side: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(len(texts), longest[side], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            at = slice(longest[side] - len(text[side]), None) if left else slice(0, len(text[side]))
            ids[row, at], mask[row, at] = torch.tensor(text[side]), 1
        return ids, mask

    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = padded(0, left=True), padded(1, left=False)
    count = completion_mask.sum()
    dtype = dtype_of(folder)
    found = {"float32": _our_loss(folder, texts, "float32"), "raykd": _our_loss(folder, texts, dtype)}
    trainer = distillation_trainer(folder, Clock(0), 1, **TRL)
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    inputs |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")  # as its training step does
    with mixed:
        loss = trainer._compute_loss(trainer.model, inputs, count)[0]
    found["distillation"] = _differentiated(trainer.model, loss)
    trainer = gkd_trainer(folder, Clock(0), 1, **TRL)
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    labels = torch.where(torch.cat([torch.zeros_like(prompt_mask), completion_mask], 1) == 1, ids, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with mixed:
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    found["gkd"] = _differentiated(trainer.model, loss)
    for name, values in found.items():
        for value, exact in zip(values, found["float32"], strict=True):
            assert abs(value - exact) < TOLERANCE[dtype] * max(1.0, abs(exact)), f"{name} computes something else: {found}"
    return {name: {"loss": loss, "gradient_norm": norm} for name, (loss, norm) in found.items()}


def _our_loss(folder: Path, texts: list[list[list[int]]], dtype: Any) -> tuple[float, float]:
    """As a learner's rank computes it from what a teacher's worker sends."""
    from raykd.algorithms import GKD
    from raykd.algorithms.base import Needs
    from raykd.algorithms.token_divergences import ReverseKL
    from raykd.collate import collate
    from raykd.experiment import TeacherConfig
    from raykd.records import Rollout, Row, Source, Totals
    from raykd.student import Student
    from raykd.teacher import Teacher

    size: dict[str, Any] = {"vocab_size": 50_257}
    teacher = Teacher(str(folder / "teacher"), TeacherConfig(dtype=dtype), **size)
    rollouts = [
        Rollout(prompt_id=str(i), sample=0, prompt_tokens=tuple(prompt), tokens=tuple(response), source=Source.DATASET)
        for i, (prompt, response) in enumerate(texts)
    ]
    scores, algorithm = teacher.score(rollouts, Needs.DISTRIBUTION), GKD(divergence=ReverseKL())
    rows = [
        Row(rollout=rollout, scores=scores, index=i, teacher_logprobs=tuple(scores.row(i).logprobs.tolist()))
        for i, rollout in enumerate(rollouts)
    ]
    student = Student(
        str(folder / "student"),
        dtype=getattr(torch, dtype),
        chunk=None,
        teacher_head=teacher.head(),
        activation_checkpointing=False,
        **size,
    )
    micro = collate(
        rows,
        algorithm,
        Totals.of(rows),
        fetch=lambda block: block,
        teacher_head=teacher.head(),
        lay=student.lay,
        **size,
    )
    return _differentiated(student.model, student(micro, algorithm)[0])


def _differentiated(model: Any, loss: torch.Tensor) -> tuple[float, float]:
    loss.backward()
    return float(loss), float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))


CONTENDERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "check": check,
    "floor": floor,
    "raykd": raykd,
    "compiled": compiled,
    "overlap": overlap,
    "distillation": distillation,
    "distillation_vllm": distillation_vllm,
    "gkd": gkd,
}


class Memory(threading.Thread):
    """High-water marks, in MB, of a process and all below it, by name; sampled until the process ends."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._marks: dict[tuple[str, int], float] = {}

    def run(self) -> None:
        """Sample."""
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            for process in [self._process, *self._process.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    name = process.cmdline()[0].partition(".")[0]
                except (OSError, psutil.Error, IndexError):
                    continue  # it has just ended
                for line in status.splitlines():
                    if line.startswith("VmHWM"):
                        self._marks[name, process.pid] = int(line.split()[1]) * 1024 / 1e6
            time.sleep(0.25)

    def peaks(self) -> dict[str, float]:
        """The largest of each name: actors of Ray as ``ray::LearnerActor``; the process itself as ``driver``."""
        peaks: dict[str, float] = {}
        for (name, pid), mark in self._marks.items():
            if pid == self._process.pid or (name.startswith("ray::") and name.endswith("Actor")):
                key = "driver" if pid == self._process.pid else name.removeprefix("ray::").removesuffix("Actor").lower()
                peaks[key] = round(max(peaks.get(key, 0.0), mark))
        return peaks


def measure(name: str, folder: Path) -> dict[str, Any]:
    """A contender in a process of its own."""
    output = folder / f"{name}.json"
    command = [sys.executable, __file__, "--contender", name, str(folder), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "GLIBC_TUNABLES": HEAP}
    with (folder / f"{name}.log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
        memory = Memory(psutil.Process(process.pid))
        memory.start()
        process.wait()
        memory.join(5.0)
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{(folder / f'{name}.log').read_text()[-4000:]}")
    found = json.loads(output.read_text())
    if name == "check":
        return found
    tokens = statistics.median(found.pop("tokens"))
    seconds = {phase: round(statistics.median(values), 3) for phase, values in found.items()}
    row = {"steps": len(found["step"]), "seconds": seconds, "tokens_per_second": round(tokens / seconds["step"], 1)}
    return row if name == "floor" else row | {"peak_megabytes": memory.peaks()}


def table(results: dict[str, Any], dtype: str) -> Table:
    """Everyone beside TRL's DistillationTrainer."""
    shown = Table(dtype, "s/step", "phases", "tokens/s", "x TRL", "learner MB", "all MB")
    base = results.get("distillation", {}).get("tokens_per_second")
    for name, row in results.items():
        if name == "check":
            continue
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["seconds"].items() if phase != "step")
        peaks = row.get("peak_megabytes", {})
        memory = str(peaks.get("learner", peaks.get("driver", ""))), str(sum(peaks.values()) or "")
        ratio = f"{row['tokens_per_second'] / base:.2f}" if base else ""
        shown.add_row(name, f"{row['seconds']['step']:.2f}", phases, f"{row['tokens_per_second']:.0f}", ratio, *memory)
    return shown


def main() -> None:
    """Measure the named contenders, or all; write them beside those measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="contender", help=f"of {', '.join(CONTENDERS)}; all where none is named")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    asked = parser.parse_args()
    if unknown := set(asked.contenders) - set(CONTENDERS):
        parser.error(f"no contender is named {', '.join(sorted(unknown))}: name some of {', '.join(CONTENDERS)}")
    folder = Path(tempfile.mkdtemp(prefix="raykd-vs-trl-"))
    prepare(folder, asked.dtype)
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked.contenders or CONTENDERS:
        results.setdefault(asked.dtype, {})[name] = {"measured": stamp()} | measure(name, folder)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for dtype, found in results.items():
        Console(width=120).print(table(found, dtype))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        torch.set_num_threads(THREADS)
        found = CONTENDERS[sys.argv[2]](Path(sys.argv[3]))
        Path(sys.argv[4]).write_text(json.dumps(found))
    else:
        main()
