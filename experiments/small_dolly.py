"""The Dolly pair: a Llama of 2.6 million parameters teaches one of 0.36 million. Both were made here, from nothing.

MiniLLM's split, prompts and protocol, as far as two CPU cores go: teacher and student read plain text, then follow Dolly's
instructions; the vocabulary is the small one of TinyStories, so that the heads stay small; a prompt has at most 128 tokens, an
answer 64 (about 30 words). The papers' sizes are in ``dolly.py``. Files are looked for in the folder that RAYKD_DATA names.
"""

import os
from typing import Any

from raykd.algorithms import SFT, AnyAlgorithm
from raykd.evaluation.suites import ALPACA
from raykd.experiment import EvaluationConfig, Experiment, LearnerConfig, Model, Optimiser, Stage, TeacherConfig
from raykd.sources import Documents

DATA = os.environ.get("RAYKD_DATA", "../shared")
TOKENIZER = f"{DATA}/models/tinystories-tok4096"
TEST = f"{DATA}/data/dolly/test.jsonl"
DOLLY = ALPACA.model_copy(update={"path": f"{DATA}/data/dolly/train.jsonl.gz"})
OPENWEBTEXT = Documents(path=f"{DATA}/data/corpus_openwebtext/openwebtext_1k.jsonl.gz")
WIKITEXT = Documents(path=f"{DATA}/data/corpus_wikitext2/valid.jsonl.gz")
"""Held out while OpenWebText is read."""
MAX_PROMPT, MAX_RESPONSE = 128, 64
TEXT_LENGTH = 128
STEPS = 48


def llama(width: int, layers: int, heads: int) -> Model:
    """A Llama from random weights."""
    scratch: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    return Model(path=TOKENIZER, scratch=scratch)


TEACHER, STUDENT = llama(192, 4, 6), llama(64, 2, 2)


def reading(model: Model, steps: int, learning_rate: float) -> Experiment:
    """Language modelling on chunks of plain text."""
    return Experiment(
        name="reading",
        student=model,
        data=WIKITEXT,
        text=OPENWEBTEXT,
        text_length=TEXT_LENGTH,
        stages=(Stage(algorithm=SFT(), steps=steps, batch_size=32, optimiser=falling(learning_rate)),),
        max_prompt=WIKITEXT.prompt_tokens,
        max_response=TEXT_LENGTH - WIKITEXT.prompt_tokens,
        learner=LearnerConfig(dtype="float32", micro_batch=32),
        evaluation=EvaluationConfig(prompts=32),
    )


def following(model: Model, steps: int, learning_rate: float) -> Experiment:
    """Fine-tuning on Dolly."""
    return Experiment(
        name="following",
        student=model,
        data=DOLLY,
        stages=(Stage(algorithm=SFT(), steps=steps, batch_size=32, optimiser=falling(learning_rate)),),
        max_prompt=MAX_PROMPT,
        max_response=MAX_RESPONSE,
        learner=LearnerConfig(dtype="float32", micro_batch=32),
        evaluation=EvaluationConfig(prompts=64),
    )


def small_dolly(method: AnyAlgorithm, measure_every: int = 0) -> Experiment:
    """Fine-tuning of the student, then the method. Teacher and student are here as they begin, with random weights."""
    fine_tuning = following(STUDENT, 200, 3e-3)
    stage = Stage(algorithm=method, steps=STEPS, batch_size=32, optimiser=falling(1e-3))
    changes = {
        "name": f"small-dolly-{method.kind}",
        "teacher": TEACHER,
        "text": OPENWEBTEXT if method.text else None,
        "text_length": TEXT_LENGTH,
        "stages": (*fine_tuning.stages, stage),
        "teachers": TeacherConfig(dtype="float32"),
        "evaluation": EvaluationConfig(prompts=64, every=measure_every),
    }
    return Experiment.model_validate(fine_tuning.model_copy(update=changes).model_dump())


def falling(learning_rate: float) -> Optimiser:
    """A cosine to nothing."""
    return Optimiser(learning_rate=learning_rate, schedule="cosine", warmup_steps=10, weight_decay=1e-2)
