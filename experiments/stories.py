"""The stories pair: stories260K, a Llama trained on TinyStories, teaches a Llama with a fifth of its parameters.

Every method gets the same student after the same fine-tuning, then the same number of steps: side by side in README.md.
The models and the stories are looked for in the folder that RAYKD_DATA names (default ../shared). Every path is a field:
``--teacher.path``, ``--student.path``, ``--data.path`` take a folder, a file, or a name on the Hub.
"""

import os

from raykd.algorithms import SFT, AnyAlgorithm
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
)
from raykd.sources import Documents

DATA = os.environ.get("RAYKD_DATA", "../shared")
TEACHER = f"{DATA}/models/stories260K"
STORIES = f"{DATA}/data/corpus_tinystories/tinystories_cased.jsonl.gz"
SFT_STEPS, STEPS = 400, 96

SIZES = {
    "fifth": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "half": {"hidden_size": 48, "intermediate_size": 136, "num_hidden_layers": 4, "num_attention_heads": 6},
}
"""Students, by the part of the teacher's 260,032 parameters that they have: 56,544 and 140,400."""


def stories(method: AnyAlgorithm, measure_every: int = 0, size: str = "fifth") -> Experiment:
    """Fine-tuning, then the method; a story's first 16 tokens are the prompt, the next 64 the response."""
    from_nothing = Optimiser(learning_rate=1e-2, schedule="cosine", warmup_steps=10)
    stages = (
        Stage(algorithm=SFT(), steps=SFT_STEPS, batch_size=32, optimiser=from_nothing),
        Stage(algorithm=method, steps=STEPS, batch_size=32, optimiser=Optimiser(learning_rate=3e-3, schedule="cosine")),
    )
    in_float32 = EngineConfig(dtype="float32")
    return Experiment(
        name=f"stories-{method.kind}",
        teacher=Model(path=TEACHER),
        student=Model(
            path=TEACHER,  # its tokenizer; the weights start from nothing
            scratch={
                "model_type": "llama",
                **SIZES[size],
                "num_key_value_heads": SIZES[size]["num_attention_heads"],
                "max_position_embeddings": 512,
                "initializer_range": 0.1,  # so narrow a model learns faster from larger weights
                "tie_word_embeddings": True,
            },
        ),
        data=Documents(path=STORIES, prompt_tokens=16),
        text=Documents(path=STORIES),
        text_length=80,
        stages=stages,
        max_prompt=16,
        max_response=64,
        rollout=RolloutConfig(engine=in_float32),
        teachers=TeacherConfig(dtype="float32", engine=in_float32),
        learner=LearnerConfig(dtype="float32", micro_batch=32),
        evaluation=EvaluationConfig(prompts=128, every=measure_every),
    )
