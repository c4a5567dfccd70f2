"""Distil a real pretrained model: stories260K (a Llama trained on TinyStories) into a Llama with a fifth of its parameters.

The models and the stories are looked for in the folder that RAYKD_DATA names (default ../shared). Every path is a field:
``--teacher.path``, ``--student.path``, ``--data.path``, ``--text.path`` take a folder, a file, or a name on the Hub.
"""

import os

from raykd.algorithms import SFT, MiniLLM
from raykd.cli import main
from raykd.experiment import (
    EngineConfig,
    Experiment,
    LearnerConfig,
    Model,
    Optimiser,
    RolloutConfig,
    Stage,
    TeacherConfig,
)
from raykd.prompts import Documents

DATA = os.environ.get("RAYKD_DATA", "../shared")
TEACHER = f"{DATA}/models/stories260K"
STORIES = f"{DATA}/data/corpus_tinystories/tinystories_cased.jsonl.gz"

EXPERIMENT = Experiment(
    name="stories-minillm",
    teacher=Model(path=TEACHER),
    student=Model(
        path=TEACHER,  # its tokenizer; the weights start from nothing
        scratch={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
    ),
    data=Documents(path=STORIES, prompt_tokens=16),
    text=Documents(path=STORIES),
    text_length=80,
    stages=(
        Stage(
            algorithm=SFT(), steps=200, batch_size=32, optimiser=Optimiser(learning_rate=3e-3, schedule="cosine", warmup_steps=10)
        ),
        Stage(algorithm=MiniLLM(rollouts=64, epochs=2), steps=80, batch_size=32, optimiser=Optimiser(learning_rate=1e-3)),
    ),
    max_prompt=16,
    max_response=64,
    rollout=RolloutConfig(engine=EngineConfig(dtype="float32")),
    teachers=TeacherConfig(dtype="float32", engine=EngineConfig(dtype="float32")),
    learner=LearnerConfig(dtype="float32", micro_batch=32, threads=2),
)

if __name__ == "__main__":
    main(EXPERIMENT)
