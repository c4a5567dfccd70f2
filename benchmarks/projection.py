"""Time and memory of reverse KL from two heads, forward and backward: dense, ours, Liger-Kernel's and TRL's fused losses.

    python benchmarks/projection.py [V:T ...]

Without a GPU: student width 256, teacher width 512, float32, two threads. On one: 4,096 and 5,120, bfloat16 (dense log-probs and
our sums in float32, as anywhere). A round runs every contender once, so that a busy machine slows all of them alike; the first is
not counted. Memory is the high-water mark over the inputs, with the gradients: of a fresh process after a first run at a tiny
size, on a GPU of PyTorch's allocator. Liger-Kernel and TRL take part where they can be imported
(``pip install --no-deps liger-kernel trl accelerate``); Liger's ``torch.compile`` wants a C++ compiler. Dense contenders whose
tensors would not fit are left out.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stamp import stamp
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from raykd.divergences import reverse_kl
from raykd.head import Head
from raykd.projection import weighted_loss

GPU = torch.cuda.is_available()
THREADS, DEVICE = 2, "cuda" if GPU else "cpu"
STUDENT, TEACHER, DTYPE = (4096, 5120, torch.bfloat16) if GPU else (256, 512, torch.float32)
SIZES = ((32_000, 2048), (50_257, 2048), (151_936, 1024), (32_000, 8192), (50_257, 8192), (151_936, 8192))
"""(V, T)."""
DENSE_LIMIT = 40 << 30 if GPU else 6 << 30
"""Bytes that dense contenders may take; they keep about seven tensors [T, V]."""
RESULTS = Path(__file__).parent / "results" / ("projection_gpu.json" if GPU else "projection.json")


class Inputs:
    """Random hidden states, heads and tokens."""

    def __init__(self, vocab_size: int, tokens: int, dtype: torch.dtype = DTYPE) -> None:
        torch.manual_seed(0)

        def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, width, device=DEVICE).mul_(scale).to(dtype)

        self.student_hidden = normal(tokens, STUDENT).requires_grad_()
        self.student_weight = normal(vocab_size, STUDENT, STUDENT**-0.5).requires_grad_()
        self.teacher_hidden, self.teacher_weight = normal(tokens, TEACHER), normal(vocab_size, TEACHER, TEACHER**-0.5)
        self.tokens = torch.randint(vocab_size, (tokens,), device=DEVICE)
        self.weights = torch.full((tokens,), 1 / tokens, device=DEVICE)

    def gradients(self, loss: Callable[["Inputs"], Tensor]) -> tuple[Tensor, Tensor]:
        """Of the mean over the tokens, one forward and one backward pass."""
        self.student_hidden.grad = self.student_weight.grad = None
        loss(self).backward()
        assert self.student_hidden.grad is not None and self.student_weight.grad is not None
        return self.student_hidden.grad, self.student_weight.grad


def dense(x: Inputs) -> Tensor:
    """The same function of log-probs, differentiated by autograd."""
    return reverse_kl(*_logprobs(x)).mean()


def dense_kl_div(x: Inputs) -> Tensor:
    """As one would write it, without care for -inf."""
    student, teacher = _logprobs(x)
    return kl_div(teacher, student, reduction="none", log_target=True).sum(-1).mean()


def _logprobs(x: Inputs) -> tuple[Tensor, Tensor]:
    student = log_softmax(x.student_hidden @ x.student_weight.T, dim=-1, dtype=torch.float32)
    return student, log_softmax(x.teacher_hidden @ x.teacher_weight.T, dim=-1, dtype=torch.float32)


def ours(x: Inputs, compiled: bool = False) -> Tensor:
    """raykd.projection."""
    loss, _ = weighted_loss(
        Head(weight=x.student_weight),
        x.student_hidden,
        x.tokens,
        x.weights,
        lambda student, teacher, *_: {"loss": reverse_kl(student, teacher)},  # pyright: ignore[reportArgumentType]
        vocab_size=len(x.student_weight),
        teacher_states=x.teacher_hidden,
        teacher_head=Head(weight=x.teacher_weight),
        compiled=compiled,
    )
    return loss


def liger(x: Inputs, compiled: bool = False) -> Tensor:
    """Its default chunks of 1,024 positions."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    return loss(x.student_hidden, x.student_weight, x.teacher_hidden, x.teacher_weight, x.tokens)


def trl(x: Inputs) -> Tensor:
    """The loss of its DistillationTrainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    args = (x.student_hidden, x.student_weight, None, x.teacher_hidden, x.teacher_weight, None, 1.0)
    return ChunkedDivergenceFunction.apply(*args)[0].mean()


def products(x: Inputs) -> list[Tensor]:
    """The four matrix products alone, each once, in PyTorch's layout: a yardstick, no bound where heads are odd or packed."""
    with torch.no_grad():
        slope = x.student_hidden @ x.student_weight.T
        return [x.teacher_hidden @ x.teacher_weight.T, slope @ x.student_weight, slope.T @ x.student_hidden]


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {"dense": dense, "dense, F.kl_div": dense_kl_div, "raykd": ours}
CONTENDERS |= {"raykd, compiled": partial(ours, compiled=True)} if which("g++") else {}
CONTENDERS |= {"Liger-Kernel": liger} if find_spec("liger_kernel") else {}
CONTENDERS |= {"Liger, compiled": partial(liger, compiled=True)} if find_spec("liger_kernel") and which("g++") else {}
CONTENDERS |= {"TRL": trl} if find_spec("trl") else {}


def contenders(vocab_size: int, tokens: int) -> dict[str, Callable[[Inputs], Tensor]]:
    """Those whose memory fits."""
    fits = 7 * 4 * vocab_size * tokens <= DENSE_LIMIT
    return {name: loss for name, loss in CONTENDERS.items() if fits or not name.startswith("dense")}


def check() -> None:
    """All compute the same, in float32."""
    x = Inputs(997, 2100, torch.float32)
    expected = x.gradients(dense)
    for name, loss in CONTENDERS.items():
        for got, wanted in zip(x.gradients(loss), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=f"{name} computes something else")


def gigaflops(vocab_size: int, tokens: int) -> float:
    """Of the four products: logits of both models, gradients of the student's hidden states and head."""
    return 2e-9 * vocab_size * tokens * (3 * STUDENT + TEACHER)


def seconds(vocab_size: int, tokens: int) -> dict[str, list[float]]:
    """Of three rounds, or of two, or one, where they are long."""
    x = Inputs(vocab_size, tokens)
    runs: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: x.gradients(loss) for name, loss in contenders(vocab_size, tokens).items()
    }
    runs["products alone"] = lambda: products(x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    work = gigaflops(vocab_size, tokens)
    for _ in range(1 + (10 if GPU else 3 if work < 300 else 2 if work < 2000 else 1)):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if GPU:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in times.items()}  # the first round compiles and warms up


def megabytes(name: str, vocab_size: int, tokens: int) -> float:
    """Peak beyond the inputs; without a GPU in a process of its own."""
    if GPU:
        x = Inputs(vocab_size, tokens)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x.gradients(CONTENDERS[name])
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    command = [sys.executable, __file__, "--memory", name, str(vocab_size), str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str, vocab_size: int, tokens: int) -> float:
    """What the fresh process of ``megabytes`` measures."""
    Inputs(997, 64).gradients(CONTENDERS[name])
    x = Inputs(vocab_size, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts at what is resident now
    before = _high_water()
    x.gradients(CONTENDERS[name])
    return (_high_water() - before) / 1e6


def _high_water() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(vocab_size: int, tokens: int) -> dict[str, Any]:
    """One row of the results."""
    times = seconds(vocab_size, tokens)
    return {
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "gigaflops": round(gigaflops(vocab_size, tokens), 1),
        "rounds": len(times["raykd"]),
        "seconds": {name: round(median(found), 5 if GPU else 2) for name, found in times.items()},
        "fastest": {name: round(min(found), 5 if GPU else 2) for name, found in times.items()},
        "gradient_megabytes": round((tokens + vocab_size) * STUDENT * DTYPE.itemsize / 1e6),
        "peak_megabytes": {name: round(megabytes(name, vocab_size, tokens)) for name in contenders(vocab_size, tokens)},
        "left_out": sorted(CONTENDERS.keys() - contenders(vocab_size, tokens).keys()),
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """Seconds (median, fastest) and peak memory of everyone."""
    shown = Table("V x T", "GFLOP", "", "median s", "fastest s", "x products", "peak MB")
    for size, row in results.items():
        bound = row["fastest"]["products alone"]
        for name, fastest in row["fastest"].items():
            memory = str(row["peak_megabytes"].get(name, ""))
            cells = (f"{row['seconds'][name]:.4g}", f"{fastest:.4g}", f"{fastest / bound:.2f}", memory)
            shown.add_row(size, f"{row['gigaflops']:.0f}", name, *cells)
        for name in row["left_out"]:
            shown.add_row(size, "", name, "does not fit")
        shown.add_section()
    return shown


def main() -> None:
    """Measure the named sizes, or all; those measured before are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="V:T", help="vocabulary and tokens; all where none is named")
    asked = parser.parse_args().sizes or [f"{vocab_size}:{tokens}" for vocab_size, tokens in SIZES]
    try:
        sizes = [(int(vocab_size), int(tokens)) for vocab_size, tokens in (size.split(":") for size in asked)]
    except ValueError:
        parser.error(f"sizes are V:T, two numbers each, got {' '.join(asked)}")
    check()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for vocab_size, tokens in sizes:
        results[f"{vocab_size:,} x {tokens:,}"] = {"measured": stamp()} | measure(vocab_size, tokens)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table(results))


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--memory"]:
        print(peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
