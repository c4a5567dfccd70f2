"""A run in one process and one thread: loop, learner, teacher and replay buffer are the system's own, nothing is an actor, and
transformers writes. For models so small that engines take longer to start than the student takes to learn.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from raykd.actors import ModelFacts
from raykd.algorithms.base import Needs
from raykd.checkpoints import newest_checkpoint, restore_workers
from raykd.experiment import Experiment
from raykd.learner import Learner
from raykd.logprobs import gather, log_softmax, mixture_logprobs
from raykd.models import check_models, model_facts
from raykd.phases import Position
from raykd.rank import meeting_place
from raykd.records import Rollout, Scores, Source
from raykd.replay import ReplayBuffer
from raykd.rollout.requests import GenerationRequest, derive_seed
from raykd.run import prepare
from raykd.run_directory import new_folder
from raykd.teacher import Teacher
from raykd.tracking import Tracker
from raykd.train import train
from raykd.usage import Usage
from raykd.validation import measure
from raykd.weights import WeightUpdate, unpack, verify
from raykd.workers import Workers


def run_in_process(experiment: Experiment, console: Console, *, reads: bool = False) -> None:
    """Run an experiment into the run directory of its name, from its newest checkpoint where it has one.

    ``reads``: it learns from chunks of its plain text in place of prompts and answers.
    """
    tokenizer = check_models(experiment)
    data = prepare(experiment, tokenizer)
    if reads:
        assert data.text is not None, "an experiment that reads names its text"
        data = replace(data, prompts=data.text, text=None)
    folder = experiment.runs.absolute() / experiment.name
    if checkpoint := newest_checkpoint(folder):
        data.restore(checkpoint.data)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        new_folder(experiment)
    facts = model_facts(experiment, tokenizer, data.vocab_size, folder)
    workers = InProcess(experiment, facts)
    config = experiment.model_dump(mode="json")
    with Tracker(folder, config, name=folder.name, wandb=False, project="", console=console) as tracker:
        at = restore_workers(workers, checkpoint) if checkpoint else Position()
        if not checkpoint:
            measure(experiment, workers, data, tracker, at)
        train(experiment, workers, data, tracker, folder, at)
        workers.save_student(folder / "student")
    tokenizer.save_pretrained(folder / "student")


class InProcess(Workers):
    """The verbs of the loop without actors. Their seconds are CPU time, so that other work on the machine does not count."""

    def __init__(self, experiment: Experiment, facts: ModelFacts) -> None:
        teacher = Teacher(facts.teacher, experiment.teachers, vocab_size=facts.vocab_size) if facts.teacher else None
        self._meeting_place = meeting_place("127.0.0.1")
        learner = Learner(
            facts.student,
            config=experiment.learner,
            rank=0,
            address=("127.0.0.1", self._meeting_place.port),
            vocab_size=facts.vocab_size,
            teacher_head=teacher.head() if teacher else None,
        )
        parts: dict[str, Any] = {"learner": Only(learner), "replay": ReplayBuffer(experiment.seed)}
        if teacher:
            parts |= {"teachers": Only(ScoringTeacher(teacher, facts.eos_ids)), "rollouts": Only(Writer(facts))}
        super().__init__(**parts, usage=Usage(("learner",), clock=time.process_time))

    def call_replay(self, method: str, *arguments: Any) -> Any:
        return getattr(self.replay, method)(*arguments)


class Only:
    """A gang of one rank and a fleet of one replica, called directly."""

    num_healthy = 1

    def __init__(self, worker: Any) -> None:
        self.ranks = self.actors = [worker]
        self._worker = worker

    def each(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """As ``LearnerGang.each``."""
        return [getattr(self._worker, method)(*(of_rank[0] for of_rank in arguments))]

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """As ``LearnerGang.all``."""
        return [getattr(self._worker, method)(*arguments)]

    def map(self, method: str, calls: Sequence[Mapping[str, Any]], *, kept: bool = False) -> list[Any]:
        """As ``Fleet.map``."""
        return [getattr(self._worker, method)(**call) for call in calls]

    def broadcast(self, method: str, call: Mapping[str, Any]) -> list[Any]:
        """As ``Fleet.broadcast``."""
        return self.map(method, [call])


class ScoringTeacher:
    """The teacher with its scores by value."""

    def __init__(self, teacher: Teacher, eos_ids: tuple[int, ...]) -> None:
        self._teacher, self._eos_ids = teacher, eos_ids

    def score(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int | None) -> tuple[Scores | None, list[Any]]:
        """As ``TeacherActor.score``."""
        return self._teacher.shared(rollouts, needs, top_k)

    def answer(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
        """As ``TeacherActor.answer``."""
        return self._teacher.answer(prompts, max_tokens, self._eos_ids)


class Writer:
    """Writes all responses token by token, as the student, the teacher, or from the mixture of both distributions itself."""

    def __init__(self, facts: ModelFacts) -> None:
        assert facts.teacher is not None
        self._student, self._teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (facts.student, facts.teacher)
        )
        self._facts, self._version = facts, 0

    def ping(self) -> str:
        """As ``RolloutActor.ping``: on the learner's node."""
        return ""

    def load(self, update: WeightUpdate, in_flight: bool) -> int:
        """Take over published weights; nothing is being written meanwhile, in flight or not."""
        for bucket in update.buckets:
            verify(bucket)
            self._student.load_state_dict(dict(unpack(bucket)), strict=False)
        self._version = update.version
        return update.version

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerationRequest], teacher_share: float, max_tokens: int, teachers: object = None
    ) -> list[Rollout]:
        """As ``RolloutActor.generate``; the requests are of one temperature."""
        ids, mask = self._left_padded([request.prompt_tokens for request in requests])
        start, ended = ids.shape[1], torch.zeros(len(requests), dtype=torch.bool)
        seed = derive_seed(self._facts.seed, self._version, requests[0].salt, requests[0].prompt_id)
        random = torch.Generator().manual_seed(seed)
        caches = {False: DynamicCache(), True: DynamicCache()}
        while ids.shape[1] < start + max_tokens and not ended.all():
            laws: list[Tensor] = []
            if teacher_share < 1:
                laws.append(_next(self._student, ids, mask, caches[False]) / requests[0].temperature)
            if teacher_share > 0:
                laws.append(_next(self._teacher, ids, mask, caches[True]))
            law = mixture_logprobs(laws[0], laws[1], teacher_share) if len(laws) == 2 else laws[0].log_softmax(-1)
            token = torch.multinomial(law.exp(), 1, generator=random)
            ids, mask = torch.cat([ids, token], -1), torch.cat([mask, torch.ones_like(token)], -1)
            ended |= torch.isin(token[:, 0], torch.tensor(self._facts.eos_ids))
        return self._rollouts(requests, ids, mask, start, teacher_share)

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are real; [B, T] each."""
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        ids = [[self._facts.eos_ids[0]] * pad + [*prompt] for pad, prompt in zip(pads, prompts, strict=True)]
        return torch.tensor(ids), torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])

    def _rollouts(
        self, requests: Sequence[GenerationRequest], ids: Tensor, mask: Tensor, start: int, teacher_share: float
    ) -> list[Rollout]:
        """Everything up to the first EOS, with the student's log-probs."""
        predicted = ids.shape[1] - start
        logits = self._student(input_ids=ids, logits_to_keep=predicted + 1, **_positions(mask, 0)).logits[:, :-1]
        logprobs = gather(log_softmax(logits), ids[:, start:]).tolist()
        source = Source.TEACHER if teacher_share == 1 else Source.MIXED if teacher_share > 0 else Source.STUDENT
        rollouts = []
        for request, tokens, of_tokens in zip(requests, ids[:, start:].tolist(), logprobs, strict=True):
            ends = [place + 1 for place, token in enumerate(tokens) if token in self._facts.eos_ids]
            length = ends[0] if ends else len(tokens)
            rollouts.append(
                Rollout(
                    prompt_id=request.prompt_id,
                    sample=request.sample,
                    prompt_tokens=request.prompt_tokens,
                    tokens=tuple(tokens[:length]),
                    source=source,
                    teacher_share=teacher_share,
                    temperature=request.temperature,
                    student_logprobs=tuple(of_tokens[:length]),
                    version=self._version,
                    finished=bool(ends),
                )
            )
        return rollouts


def _next(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """log-probs of the next token; [B, V]."""
    seen = cache.get_seq_length()
    read = {"input_ids": ids[:, seen:], "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return log_softmax(model(**read, **_positions(mask, seen)).logits[:, -1])


def _positions(mask: Tensor, seen: int) -> dict[str, Tensor]:
    """The real tokens of a row count from 0, wherever it begins."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]}
