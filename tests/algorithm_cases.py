"""What the tests of the algorithms share: random cases, hand-made cases in halves, and the two steps of an algorithm in one."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raykd.algorithms.base import Algorithm, Progress
from raykd.logprobs import gather, mixture_logprobs
from raykd.records import Batch, Rollout, Row, Source, Totals

# Distributions over five tokens whose log-ratios are whole numbers of bits. In bits:
# KL(STEEP || FLAT) = KL(FLAT || STEEP) = 1/4, KL(STEEP || TURNED) = KL(TURNED || STEEP) = 27/16.
STEEP = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16)
FLAT = (1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8)
TURNED = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
ANY = (1 / 16, 1 / 2, 1 / 16, 1 / 4, 1 / 8)


@dataclass(frozen=True)
class Case:
    """B responses with both distributions at every position."""

    logits: Tensor
    """[B, T, V], the student's."""
    teacher: Tensor
    """[B, T, V] log-probs."""
    batch: Batch


def response_mask(lengths: list[int]) -> Tensor:
    """[B, max(lengths)] bool, True on the first ``lengths[b]`` positions of row b."""
    return torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]


def random_case(lengths: list[int], *, vocab: int = 5, seed: int = 0, share: float = 0.2, drift: float = 0.3) -> Case:
    """Float64; the student has moved by ``drift`` since it wrote every other response with the teacher's share ``share``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths, default=0), vocab)
    old, teacher, step = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    tokens = torch.randint(vocab, shape[:2], generator=generator)
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return two_sided(make_case(old + drift * step, old, teacher.log_softmax(-1), tokens, lengths, share), rewards)


def two_sided(case: Case, rewards: Tensor | None = None) -> Case:
    """The student wrote the even responses, the teacher the odd ones."""
    by_student = torch.arange(len(case.batch.mask)) % 2 == 0
    rewards = case.batch.rewards if rewards is None else rewards
    return replace(case, batch=replace(case.batch, by_student=by_student, rewards=rewards))


def make_case(logits: Tensor, old: Tensor, teacher: Tensor, tokens: Tensor, lengths: list[int], share: float) -> Case:
    mask = response_mask(lengths)
    student_logprobs, teacher_logprobs = gather(old.log_softmax(-1), tokens), gather(teacher, tokens)
    batch = Batch(
        tokens=torch.where(mask, tokens, 0),
        mask=mask,
        totals=Totals(tokens=sum(lengths), sequences=len(lengths)),
        student_logprobs=torch.where(mask, student_logprobs, 0.0),
        teacher_logprobs=torch.where(mask, teacher_logprobs, 0.0),
        behaviour_logprobs=torch.where(mask, mixture_logprobs(student_logprobs, teacher_logprobs, share), 0.0),
        by_student=torch.ones(len(lengths), dtype=torch.bool),
        rewards=torch.zeros(len(lengths), dtype=torch.float64),
    )
    return Case(logits, teacher, batch)


def hand_case() -> Case:
    """2 responses of 3 and 2 tokens over 5 tokens, on-policy: student FLAT and teacher STEEP, then STEEP and TURNED."""
    student = torch.tensor([[FLAT, FLAT, FLAT], [STEEP, STEEP, ANY]], dtype=torch.float64).log()
    teacher = torch.tensor([[STEEP, STEEP, STEEP], [TURNED, TURNED, ANY]], dtype=torch.float64).log()
    return make_case(student, student, teacher, torch.tensor([[0, 1, 2], [0, 4, 3]]), [3, 2], share=0.0)


def part(case: Case, rows: list[int]) -> Case:
    """Some responses as a micro-batch of the same step, cut to the longest of them."""
    width = int(case.batch.mask[rows].sum(-1).max())
    names = ("tokens", "mask", "student_logprobs", "teacher_logprobs", "behaviour_logprobs")
    of_rows = {name: getattr(case.batch, name)[rows] for name in ("by_student", "rewards")}
    batch = replace(case.batch, **{name: getattr(case.batch, name)[rows, :width] for name in names}, **of_rows)
    return Case(case.logits[rows, :width], case.teacher[rows, :width], batch)


def evaluate(algorithm: Algorithm, case: Case, logits: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics as the learner takes them: sequences, then tokens, padding left out, then the weighted sum."""
    batch = counted(algorithm, case).batch
    student, mask = (case.logits if logits is None else logits).log_softmax(-1), batch.mask
    given = {name: values[mask] for name, values in algorithm.per_sequence(batch).items()}
    teacher = case.teacher[mask] if algorithm.needs.distribution else None
    values = algorithm.per_token(student[mask], teacher, batch.tokens[mask], given)
    loss = (values.pop("loss") * algorithm.token_weights(batch)[mask]).sum()
    return loss, {name: value.sum() / max(1, batch.totals.tokens) for name, value in values.items()}


def counted(algorithm: Algorithm, case: Case) -> Case:
    """The case as a step of its own, a third of the stage done, with what the algorithm counts over a step, unless it is a part
    of one already."""
    numbers = case.batch.totals.numbers or algorithm.per_step(Progress(step=4, steps=12), recorded_rows(case.batch))
    return replace(case, batch=replace(case.batch, totals=replace(case.batch.totals, numbers=numbers)))


def recorded_rows(batch: Batch) -> list[Row]:
    """The responses of a batch as the replay buffer holds them."""
    rows = []
    for index, mask in enumerate(batch.mask):
        tokens, student, teacher = (
            tuple(values[index][mask].tolist()) for values in (batch.tokens, batch.student_logprobs, batch.teacher_logprobs)
        )
        rollout = Rollout(
            prompt_id=str(index),
            sample=0,
            prompt_tokens=(0,),
            tokens=tokens,
            source=Source.STUDENT if batch.by_student[index] else Source.TEACHER,
            student_logprobs=student,
        )
        rows.append(Row(rollout=rollout, teacher_logprobs=teacher, reward=batch.rewards[index].item()))
    return rows


def loss_and_gradient(algorithm: Algorithm, case: Case) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the student's logits ``[B, T, V]``."""
    loss, _, gradient = learned(algorithm, case)
    return loss, gradient


def learned(algorithm: Algorithm, case: Case) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, the metrics, and the gradient to the student's logits ``[B, T, V]``."""
    logits = case.logits.clone().requires_grad_()
    loss, metrics = evaluate(algorithm, case, logits)
    return loss.detach(), metrics, torch.autograd.grad(loss, logits)[0]
