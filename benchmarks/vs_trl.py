"""On-policy distillation beside TRL's DistillationTrainer and GKDTrainer: seconds and memory of a step, phase by phase.

    python benchmarks/vs_trl.py [--dtype bfloat16] [--lengths uneven] [CONTENDER ...]

Random-weight Llamas (``llamas.py``) with GPT-2's tokenizer, two threads; 8 prompts of 32 tokens, reverse KL, AdamW. Responses
have 128 tokens each, so that nobody computes padding, or with ``--lengths uneven`` end as Dolly's answers do, at 63 on average
and 256 at most. Checkpoints are float32 or bfloat16; then TRL runs with its default ``bf16=True`` and steps bfloat16 weights,
ours keeps float32 master weights. Every contender is a process of its own, given the same models and prompts; ours is
``run(Experiment)`` with its actors, "compiled" the same with ``learner.compiled``, "overlap" also with ``max_staleness`` 1 and
one thread for the learner and for the engine that writes, "in_flight" two phases ahead with ``in_flight``. "distillation"
writes with transformers, TRL's default, "distillation_vllm" with vLLM in its own process (``use_vllm=True,
vllm_mode="colocate"``). All have the settings of the C library that our actors have. Seconds are medians of the steps after the
first three, or their mean where lengths are uneven. Memory is the high-water mark of resident memory of the process that
learns; for ours also the sum over driver and actors, each with its own copy of the libraries (0.5 to 0.9 GB), shared pages
counted in each; Ray's own processes are not.

"check": all three give the same loss and gradient on the same samples of unequal length; in bfloat16 they are compared with what
ours computes from the same weights in float32. "floor": the matrix products of a step, each once, as if they ran at the rate of
this machine's fastest product, or that of reading the weights where that takes longer.

TRL takes part where it can be imported: ``pip install --no-deps trl==1.16.0 accelerate``. "distillation_vllm" needs a
CPU on which vLLM does not pack its matrices (AVX2, not AVX-512): those take no weights in the way that TRL hands them over.
RAYKD_DATA names the folder that holds ``models/gpt2-tokenizer`` and TinyStories (default ../shared).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from folders import temporary
from llamas import SHAPES, UNEVEN, VOCABULARY, random_llama
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import AutoTokenizer
from trl_trainers import Clock, distillation_trainer, gkd_trainer

from raykd.fleet import HEAP

DATA = Path(os.environ.get("RAYKD_DATA", "../shared"))
TOKENIZER = DATA / "models/gpt2-tokenizer"
STORIES = DATA / "data/corpus_tinystories/tinystories_cased.jsonl.gz"
BATCH, PROMPT, THREADS = 8, 32, 2
LENGTHS: dict[str, tuple[int, float | None]] = {"equal": (128, None), "uneven": UNEVEN}
"""The longest response, and how likely one ends at a token."""
STEPS = {"equal": {"raykd": 13, "trl": 8}, "uneven": {"raykd": 33, "trl": 19}}
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
RATE = 1e-9
"""So small that what is written stays what it was: at 1e-5 an untrained student finds out within ten steps that EOS is what its
teacher and it agree on."""
RESULTS = Path(__file__).parent / "results" / "vs_trl.json"


TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative, of loss and gradient norm."""


@dataclass(frozen=True)
class Task:
    """What every contender is given: models and prompts in a folder, and how long responses are."""

    folder: Path
    dtype: Any
    lengths: str

    @property
    def longest(self) -> int:
        """The longest response, tokens."""
        return LENGTHS[self.lengths][0]

    def drawn(self, steps: int) -> torch.Tensor:
        """Lengths of the responses of so many steps, ``[steps, BATCH]``."""
        ending = LENGTHS[self.lengths][1]
        law = torch.full((steps, BATCH), float(self.longest))
        if ending is not None:
            law.geometric_(ending, generator=torch.Generator().manual_seed(0))
        return law.clamp(max=self.longest).int()

    def trl(self) -> dict[str, Any]:
        """Arguments of TRL's trainers."""
        return {"batch": BATCH, "rate": RATE, "max_new_tokens": self.longest, "steps": STEPS[self.lengths]["trl"]}

    def prepare(self) -> None:
        """Both models and the prompts. The logits are scaled so that the distributions are not flat."""
        from raykd.sources import Documents, read_rows
        from raykd.tokenise import tokenise_documents

        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        for seed, name in enumerate(SHAPES):
            model = random_llama(name, seed, sharpness=8.0, ending=LENGTHS[self.lengths][1])
            model.to(getattr(torch, self.dtype)).save_pretrained(self.folder / name)
            tokenizer.save_pretrained(self.folder / name)
        source = Documents(path=str(STORIES), prompt_tokens=PROMPT, limit=4000)
        prompts = tokenise_documents(read_rows(source), source, tokenizer, max_response=1)
        texts = (tokenizer.decode(prompt.tokens) for prompt in prompts)
        same = [text for text in texts if len(tokenizer(text).input_ids) == PROMPT]
        needed = BATCH * max(STEPS[self.lengths].values())
        assert len(same) >= needed, f"{len(same)} prompts of {PROMPT} tokens, {needed} are needed"
        with (self.folder / "prompts.jsonl").open("w") as file:
            file.writelines(json.dumps({"prompt": text}) + "\n" for text in same[:needed])


def raykd(
    task: Task, max_staleness: int = 0, threads: int = THREADS, compiled: bool = False, in_flight: bool = False
) -> dict[str, Any]:
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
    from raykd.run import run
    from raykd.sources import Pairs

    engine = EngineConfig(dtype=task.dtype, threads=threads)
    stage = Stage(
        algorithm=GKD(divergence=ReverseKL()),
        steps=STEPS[task.lengths]["raykd"],
        batch_size=BATCH,
        max_staleness=max_staleness,
        in_flight=in_flight,
        optimiser=Optimiser(learning_rate=RATE),
    )
    experiment = Experiment(
        name="vs-trl",
        student=Model(path=str(task.folder / "student")),
        teacher=Model(path=str(task.folder / "teacher")),
        data=Pairs(path=str(task.folder / "prompts.jsonl"), response=None),
        stages=(stage,),
        max_prompt=PROMPT,
        max_response=task.longest,
        rollout=RolloutConfig(engine=engine),
        teachers=TeacherConfig(dtype=task.dtype, engine=engine, threads=THREADS),
        learner=LearnerConfig(dtype=task.dtype, threads=threads, compiled=compiled),
        evaluation=EvaluationConfig(prompts=0),
        tracking=TrackingConfig(wandb=False),
        runs=task.folder / "runs",
    )
    result = run(experiment)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    verbs = ("generate", "score", "learn", "publish", "load", "wait")
    return {
        "step": [line["seconds"] - before["seconds"] for before, line in pairwise(lines)][WARM_UP - 1 :],
        "tokens": [BATCH * line["response_length"] for line in lines][WARM_UP:],
        **{verb: [line.get(f"seconds/{verb}", 0.0) for line in lines][WARM_UP:] for verb in verbs},
    }


def compiled(task: Task) -> dict[str, Any]:
    """``learner.compiled``."""
    return raykd(task, compiled=True)


def overlap(task: Task) -> dict[str, Any]:
    """The next responses are written while the learner learns, each by a thread; the teacher, whose work comes in bursts, has
    two. Compiled, too."""
    return raykd(task, max_staleness=1, threads=1, compiled=True)


def in_flight(task: Task) -> dict[str, Any]:
    """Overlap, but two phases ahead, and all of them are written at the same time."""
    return raykd(task, max_staleness=2, threads=1, compiled=True, in_flight=True)


def distillation(task: Task) -> dict[str, Any]:
    """TRL's DistillationTrainer."""
    clock = Clock(WARM_UP)
    distillation_trainer(task.folder, clock, **task.trl()).train()
    return clock.result()


def distillation_vllm(task: Task) -> dict[str, Any]:
    """TRL's DistillationTrainer, whose responses vLLM writes."""
    os.environ.update(VLLM_ALONE)
    clock = Clock(WARM_UP)
    distillation_trainer(task.folder, clock, **task.trl(), by_vllm=True).train()
    return clock.result()


def gkd(task: Task) -> dict[str, Any]:
    """TRL's GKDTrainer."""
    clock = Clock(WARM_UP)
    gkd_trainer(task.folder, clock, **task.trl()).train()
    return clock.result()


def floor(task: Task) -> dict[str, Any]:
    """Nothing but the matrix products of a step, each once, at this machine's rates."""
    dtype = getattr(torch, task.dtype)
    flops, bytes_read = _rates(dtype)
    head = {name: VOCABULARY * SHAPES[name]["hidden_size"] for name in SHAPES}
    body = {name: sum(m * n for m, n in _matrices(SHAPES[name])) for name in SHAPES}

    def seconds(numbers: int, rows: int) -> float:
        """Of a product of ``rows`` states and matrices of so many numbers."""
        return max(2 * numbers * rows / flops, numbers * dtype.itemsize / bytes_read)

    def phases(lengths: torch.Tensor) -> dict[str, float]:
        """Seconds and tokens of a step whose responses have these ``lengths``."""
        written, read = int(lengths.sum()), int((PROMPT + lengths - 1).sum())
        rows = [int((lengths > place).sum()) for place in range(1, int(lengths.max()))]
        decoding = sum(seconds(body["student"] + head["student"], n) for n in rows)
        times = {
            "generate": seconds(body["student"], BATCH * PROMPT) + seconds(head["student"], BATCH) + decoding,
            "score": seconds(body["teacher"], read),
            "learn": 3 * seconds(body["student"], read)
            + 3 * seconds(head["student"], written)
            + seconds(head["teacher"], written),
        }
        return times | {"step": sum(times.values()), "tokens": written}

    steps = [phases(lengths) for lengths in task.drawn(200)]
    return {name: [step[name] for step in steps] for name in steps[0]}


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
    for rows, inputs, outputs in ((1024, 512, 1536), (1280, 256, 688), (256, 512, VOCABULARY), (2048, 2048, 2048)):
        first, second = torch.randn(rows, inputs, dtype=dtype), torch.randn(inputs, outputs, dtype=dtype)
        most = max(most, 2 * rows * inputs * outputs / best(partial(torch.mm, first, second)))
    numbers = torch.ones(2**26)
    return most, numbers.nbytes / best(numbers.sum)


def _matrices(shape: dict[str, Any]) -> list[tuple[int, int]]:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    layer = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return layer * shape["num_hidden_layers"]


def check(task: Task) -> dict[str, Any]:
    """Losses and gradient norms of all three on the same tokens, responses of 5 to 40 tokens after prompts of 3 to 17."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 40), (17, 5), (9, 23), (12, 31)]
    texts = [[torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
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
    found = {"float32": _our_loss(task, texts, "float32"), "raykd": _our_loss(task, texts, task.dtype)}
    trainer = distillation_trainer(task.folder, Clock(0), **task.trl())
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    inputs |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=task.dtype == "bfloat16")  # as its training step does
    with mixed:
        loss = trainer._compute_loss(trainer.model, inputs, count)[0]
    found["distillation"] = _differentiated(trainer.model, loss)
    trainer = gkd_trainer(task.folder, Clock(0), **task.trl())
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    labels = torch.where(torch.cat([torch.zeros_like(prompt_mask), completion_mask], 1) == 1, ids, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with mixed:
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count)
    found["gkd"] = _differentiated(trainer.model, loss)
    for name, values in found.items():
        for value, exact in zip(values, found["float32"], strict=True):
            assert abs(value - exact) < TOLERANCE[task.dtype] * max(1.0, abs(exact)), f"{name} computes something else: {found}"
    return {name: {"loss": loss, "gradient_norm": norm} for name, (loss, norm) in found.items()}


def _our_loss(task: Task, texts: list[list[list[int]]], dtype: Any) -> tuple[float, float]:
    """As a learner's rank computes it from what a teacher's worker sends."""
    from raykd.algorithms import GKD
    from raykd.algorithms.base import Needs
    from raykd.algorithms.token_divergences import ReverseKL
    from raykd.collate import collate
    from raykd.experiment import TeacherConfig
    from raykd.records import Rollout, Row, Source, Totals
    from raykd.student import Student
    from raykd.teacher import Teacher

    size: dict[str, Any] = {"vocab_size": VOCABULARY}
    teacher = Teacher(str(task.folder / "teacher"), TeacherConfig(dtype=dtype), **size)
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
        str(task.folder / "student"),
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


CONTENDERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "check": check,
    "floor": floor,
    "raykd": raykd,
    "compiled": compiled,
    "overlap": overlap,
    "in_flight": in_flight,
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


def measure(name: str, task: Task) -> dict[str, Any]:
    """A contender in a process of its own."""
    folder, output = task.folder, task.folder / f"{name}.json"
    command = [sys.executable, __file__, "--contender", name, str(folder), task.dtype, task.lengths, str(output)]
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
    middle = statistics.median if task.lengths == "equal" else statistics.mean
    tokens = middle(found.pop("tokens"))
    seconds = {phase: round(middle(values), 3) for phase, values in found.items()}
    row = {"steps": len(found["step"]), "seconds": seconds, "tokens_per_second": round(tokens / seconds["step"], 1)}
    return row if name == "floor" else row | {"peak_megabytes": memory.peaks()}


def table(results: dict[str, Any], name: str) -> Table:
    """Everyone beside TRL's DistillationTrainer."""
    shown = Table(name, "s/step", "phases", "tokens/s", "x TRL", "learner MB", "all MB")
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
    parser.add_argument("--lengths", choices=list(LENGTHS), default="equal")
    asked = parser.parse_args()
    if unknown := set(asked.contenders) - set(CONTENDERS):
        parser.error(f"no contender is named {', '.join(sorted(unknown))}: name some of {', '.join(CONTENDERS)}")
    task = Task(temporary("vs-trl"), asked.dtype, asked.lengths)
    task.prepare()
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    for name in asked.contenders or CONTENDERS:
        try:
            found = {"measured": stamp()} | measure(name, task)
        except RuntimeError as error:
            failed.append(str(error))
            continue
        results.setdefault(f"{asked.dtype}, {asked.lengths} lengths", {})[name] = found
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for name, found in results.items():
        Console(width=120).print(table(found, name))
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        torch.set_num_threads(THREADS)
        contender, folder, dtype, lengths, output = sys.argv[2:]
        found = CONTENDERS[contender](Task(Path(folder), dtype, lengths))
        Path(output).write_text(json.dumps(found))
    else:
        main()
