"""Which part of the teacher's distribution forward and reverse KL fit first: the claim that AKL is built on (arXiv 2404.02657).

At a position with teacher p and student q, the head is the smallest set of the teacher's tokens of mass >= 1/2, and

    head gap = sum_{v in head} |p_v - q_v|,   tail gap = sum_{v not in head} |p_v - q_v|

Both are means over the positions of held-out stories, while the student learns from other stories by either divergence:
word-level distillation in a plain loop, from random weights and from the fine-tuned student.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from stories import STEPS, TEACHER, stories
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd.algorithms import SFT
from raykd.divergences import forward_kl, reverse_kl
from raykd.prompts import PromptStream
from raykd.records import Prompt
from raykd.run import prepare

GAPS = "gaps.json"
SETTING = stories(SFT())
"""Stories and lengths."""
WATCHED = (0, 2, 4, 8, 16, 32, 64, STEPS)
BATCH, WARMUP = 32, 8
RATES = {"random": 1e-2, "fine-tuned": 1e-3}
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


def watch_gaps(untrained: Path, fine_tuned: Path, output: Path, seed: int) -> None:
    """start -> divergence -> [{step, head, tail}], into ``output``."""
    data = prepare(SETTING, AutoTokenizer.from_pretrained(TEACHER))
    held_out, others = _whole(data.held_out), _whole(data.prompts.items)
    teacher = _load(TEACHER)
    starts = {"random": untrained, "fine-tuned": fine_tuned}
    found = {
        start: {
            name: _learn(_load(str(folder)), teacher, divergence, PromptStream(others, seed), held_out, RATES[start])
            for name, divergence in DIVERGENCES.items()
        }
        for start, folder in starts.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / GAPS).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _learn(
    student: nn.Module,
    teacher: nn.Module,
    divergence: Callable[[Tensor, Tensor], Tensor],
    prompts: PromptStream[Prompt],
    held_out: Sequence[Prompt],
    rate: float,
) -> list[dict[str, float]]:
    adam = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    points = [{"step": 0, **_gaps(student, teacher, held_out)}]
    for before, after in pairwise(WATCHED):
        for step in range(before, after):
            batch = prompts.take(BATCH)
            loss = divergence(_logprobs(student, batch), _logprobs(teacher, batch).detach()).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for group in adam.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
            adam.step()
        points.append({"step": after, **_gaps(student, teacher, held_out)})
    return points


@torch.no_grad()
def _gaps(student: nn.Module, teacher: nn.Module, prompts: Sequence[Prompt]) -> dict[str, float]:
    head, tail = head_and_tail(_logprobs(student, prompts), _logprobs(teacher, prompts))
    return {"head": float(head.mean()), "tail": float(tail.mean())}


def head_and_tail(student: Tensor, teacher: Tensor, head_mass: float = 0.5) -> tuple[Tensor, Tensor]:
    """The head's and the tail's part of sum_v |p_v - q_v|; log-probabilities ``[..., V] -> [...]`` each."""
    mass, order = teacher.exp().sort(-1, descending=True)
    in_head = mass.cumsum(-1) - mass < head_mass
    gaps = (teacher.exp() - student.exp()).abs().gather(-1, order)
    return (gaps * in_head).sum(-1), (gaps * ~in_head).sum(-1)


def _logprobs(model: nn.Module, prompts: Sequence[Prompt]) -> Tensor:
    """At the positions that predict the responses, which are all of one length; [B, T, V]."""
    ids = torch.tensor([prompt.tokens + prompt.response for prompt in prompts])
    return model(input_ids=ids).logits[:, len(prompts[0].tokens) - 1 : -1].log_softmax(-1)


def _whole(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those whose story fills the response, so that nothing is padded."""
    return [prompt for prompt in prompts if len(prompt.response) == SETTING.max_response]


def _load(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
