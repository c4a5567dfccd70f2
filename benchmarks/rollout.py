"""Tokens per second of student, teacher and teacher-mixed responses on vLLM, beside a Hugging Face lockstep mixture.

    python benchmarks/rollout.py [--batches 8 32 128] [--repeats 5] [--dtype bfloat16] [--lengths uneven]

Random-weight Llamas (``llamas.py``); prompts of 32 tokens, a fifth of the tokens from the teacher. Each engine has a process and
one thread, as in a run, so that the two that mix have two cores and one alone has one. The lockstep mixture, which feeds every
token to both models and samples from their mixed probabilities until all responses have ended, as the papers' code does, has two
threads while the engines rest; "lockstep" draws by torch.multinomial, "inverted" by inverting the cumulated law. Neither returns
log-probs, which ours records. All take turns within each repeat, medians are reported.

Responses have 64 tokens each, which favours lockstep, or with ``--lengths uneven`` end as Dolly's answers do, at 63 on average
and 256 at most. "drafted" is draft and verify (``drafted.py``) with drafts of 16 tokens; its speed depends on how much the models
differ, so these are made to differ as a teacher and its student do: by a total variation of 0.30.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from drafted import drafted_response, verify
from folders import temporary
from llamas import EOS, SHAPES, UNEVEN, VOCABULARY, random_llama
from rich.console import Console
from rich.table import Table
from stamp import stamp
from transformers import AutoModelForCausalLM

from raykd.actors import ModelFacts, RolloutActor, TeacherActor
from raykd.experiment import EngineConfig, RolloutConfig, TeacherConfig
from raykd.fleet import environment
from raykd.rollout.requests import GenerationRequest

PROMPT, SHARE, DRAFT = 32, 0.2, 16
LENGTHS: dict[str, tuple[int, float | None]] = {"equal": (64, None), "uneven": UNEVEN}
"""The longest response, and how likely one ends at a token."""
SHARPNESS = 1.4
"""Of both models: so they differ by a total variation of 0.30."""
RESULTS = Path(__file__).parent / "results" / "rollout.json"

Prompts = Sequence[tuple[int, ...]]


class Teacher(TeacherActor):
    """The teacher of a run, asked for whole responses, and to verify drafts."""

    async def write(self, prompts: Prompts, longest: int, seed: int) -> int:
        """A response to each prompt; returns the number of their tokens, as all the following."""
        assert self._engine is not None
        written = await asyncio.gather(*(self._engine.complete(p, longest, seed + i) for i, p in enumerate(prompts)))
        return sum(len(completion.tokens) for completion in written)

    async def verify(self, text: Sequence[int], places: Sequence[int], session: str) -> list[float]:
        """Log-probs of some tokens of a text."""
        assert self._engine is not None
        return await verify(self._engine, text, places, session=session)


class Student(RolloutActor):
    """The student of a run, asked to write drafts."""

    async def draft(self, prompts: Prompts, longest: int, seed: int, teacher: Any) -> int:
        """A response to each prompt, verified by the teacher."""
        engine, verifier = self._worker.engine, Verifier(teacher)
        seeds = range(seed, seed + len(prompts))
        responses = (drafted_response(p, engine, verifier, SHARE, longest, s, DRAFT) for p, s in zip(prompts, seeds, strict=True))
        return sum(len(completion.tokens) for completion in await asyncio.gather(*responses))

    async def mix(self, requests: Sequence[GenerationRequest], share: float, longest: int, teacher: Any) -> int:
        """A response to each request, as in a run."""
        return sum(len(rollout.tokens) for rollout in await self.generate(requests, share, longest, [teacher]))


class Verifier:
    """The teacher in another process."""

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher

    async def complete(self, text: Sequence[int], max_tokens: int, seed: int, *, session: str) -> Any:
        (written,) = await self._teacher.complete.remote([(text, seed, session)], max_tokens)
        return written

    async def verify(self, text: Sequence[int], places: Sequence[int], *, session: str) -> list[float]:
        return await self._teacher.verify.remote(text, places, session)

    async def forget(self, session: str) -> None:
        self._teacher.forget.remote(session)


class Lockstep:
    """Both models in Hugging Face's code, token by token."""

    def __init__(self, student: str, teacher: str, dtype: str) -> None:
        torch.set_num_threads(2)
        self._models: list[Any] = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (student, teacher)]

    @torch.inference_mode()
    def write(self, prompts: Prompts, longest: int, draw: Callable[[torch.Tensor], torch.Tensor]) -> int:
        """A response to each prompt."""
        tokens, caches = torch.tensor(prompts), [None, None]
        going, written = torch.ones(len(prompts), dtype=torch.bool), 0
        for _ in range(longest):
            steps = [
                model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                for model, cache in zip(self._models, caches, strict=True)
            ]
            caches = [step.past_key_values for step in steps]
            q, p = (step.logits[:, -1].float().softmax(-1) for step in steps)
            tokens = draw(SHARE * p + (1 - SHARE) * q)
            written += int(going.sum())
            going &= tokens[:, 0] != EOS
            if not going.any():
                break
        return written


def by_multinomial(law: torch.Tensor) -> torch.Tensor:
    """As transformers and the papers' code draw."""
    return torch.multinomial(law, 1)


def by_inversion(law: torch.Tensor) -> torch.Tensor:
    """With one random number a row: the fastest that torch has functions for."""
    up_to = law.cumsum(-1)
    return torch.searchsorted(up_to, torch.rand(len(law), 1) * up_to[:, -1:]).clamp(max=law.shape[-1] - 1)


def create(actor_class: type, *arguments: Any, threads: int = 1) -> Any:
    """An actor that has so many threads of the CPU."""
    env = {"env_vars": environment(threads, on_cpu=True)}
    return ray.remote(actor_class).options(num_cpus=0, runtime_env=env).remote(*arguments)


def start(folder: Path, dtype: str, lengths: str) -> tuple[Any, Any]:
    """Student and teacher, each in a process of its own; their models are in ``folder``, by their names."""
    longest, ending = LENGTHS[lengths]
    for seed, name in enumerate(SHAPES):
        random_llama(name, seed, SHARPNESS, ending).save_pretrained(folder / name)
    facts = ModelFacts(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        vocab_size=VOCABULARY,
        eos_ids=(EOS,),
        max_length=PROMPT + longest + 1,
        seed=0,
    )
    engine = EngineConfig(dtype=dtype)

    student = create(Student, RolloutConfig(engine=engine), facts)
    teacher = create(Teacher, TeacherConfig(dtype=dtype, engine=engine), facts, True)
    ray.get([student.ping.remote(), teacher.ping.remote()])
    return student, teacher


def draw_prompts(batch: int) -> list[tuple[int, ...]]:
    """The same ones for a size."""
    generator = torch.Generator().manual_seed(batch)
    return [tuple(row) for row in torch.randint(0, EOS, (batch, PROMPT), generator=generator).tolist()]


def requests_for(prompts: Prompts, salt: int) -> list[GenerationRequest]:
    """One a prompt."""
    return [GenerationRequest(prompt_id=str(i), sample=0, prompt_tokens=p, salt=salt) for i, p in enumerate(prompts)]


def measure(actors: tuple[Any, Any, Any], batch: int, longest: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each way to write ``batch`` responses."""
    student, teacher, lockstep = actors
    prompts = draw_prompts(batch)

    def generate(share: float, repeat: int) -> Any:
        return student.mix.remote(requests_for(prompts, repeat), share, longest, teacher)

    ways: dict[str, Callable[[int], Any]] = {
        "student": lambda repeat: generate(0.0, repeat),
        "teacher": lambda repeat: teacher.write.remote(prompts, longest, repeat * batch),
        "mixed": lambda repeat: generate(SHARE, repeat),
        "drafted": lambda repeat: student.draft.remote(prompts, longest, repeat * batch, teacher),
        "lockstep": lambda repeat: lockstep.write.remote(prompts, longest, by_multinomial),
        "inverted": lambda repeat: lockstep.write.remote(prompts, longest, by_inversion),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, begin in ways.items():
            started = time.perf_counter()
            tokens = ray.get(begin(repeat))
            if repeat:  # the first of each size is slow
                rates[way].append(tokens / (time.perf_counter() - started))
    return {way: statistics.median(values) for way, values in rates.items()}


def main() -> None:
    """Measure every batch size, print the table, write it as JSON beside the sizes measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", default="equal", choices=list(LENGTHS))
    options = parser.parse_args()
    if min(*options.batches, options.repeats) < 1:
        parser.error("batches and repeats must be at least 1")
    RESULTS.parent.mkdir(exist_ok=True)
    ray.init("local", include_dashboard=False, log_to_driver=False)
    folder = temporary("rollout")
    student, teacher = start(folder, options.dtype, options.lengths)
    lockstep = create(Lockstep, str(folder / "student"), str(folder / "teacher"), options.dtype, threads=2)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    ratios = ("teacher", "lockstep", "inverted")
    table = Table(
        "batch", "student", "teacher", "mixed", "drafted", "lockstep", "inverted", *(f"mixed / {way}" for way in ratios)
    )
    for batch in options.batches:
        rates = measure((student, teacher, lockstep), batch, LENGTHS[options.lengths][0], options.repeats)
        row = {"measured": stamp(), "repeats": options.repeats, "tokens_per_second": rates}
        results[f"{options.dtype} {batch} {options.lengths}"] = row
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        times = (f"{rates['mixed'] / rates[other]:.2f}x" for other in ratios)
        table.add_row(str(batch), *(f"{rate:,.0f}" for rate in rates.values()), *times)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
