"""MiniLLM's LLaMA row: a 13B teacher, a 7B student, databricks-dolly-15k (arXiv 2306.08543; Dolly Rouge-L 29.0, SFT 26.3).

Eight GPUs of 80 GB, one actor each:

    learner   4 ranks      ZeRO-3: 7B weights, gradients and AdamW state at 16 bytes a parameter, 27 GB a rank
    teacher   2 replicas   the scorer (26 GB) beside the engine that writes the teacher's share of mixed responses (26 GB + cache)
    rollout   2 replicas   one vLLM engine each: 13.5 GB and its cache

Settings are the paper's and its code's: SFT 3 epochs, then 5,000 steps of 64 responses, 256 a phase for 4 epochs, learning
rate 5e-6 with 100 steps of warm-up. The paper's plain text is the RoBERTa corpus; OpenWebText, its choice for GPT-2, stands here.
The teacher is the paper's own, fine-tuned on Dolly.

``--scale tiny`` runs this file, layout and code path on a CPU: Llamas of a few thousand parameters, four steps.
"""

import tempfile
from pathlib import Path

from raykd.algorithms import SFT, MiniLLM
from raykd.cli import main
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
from raykd.prompts import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Documents, Pairs

EXPERIMENT = Experiment(
    name="minillm-llama13b",
    teacher=Model(path="MiniLLM/teacher-llama-13B"),
    student=Model(path="huggyllama/llama-7b"),
    data=Pairs(
        path="databricks/databricks-dolly-15k",
        prompt=ALPACA_WITH_INPUT.replace("{input}", "{context}"),
        prompt_without_input=ALPACA_WITHOUT_INPUT,
        response="{response}",
    ),
    text=Documents(path="Skylion007/openwebtext", limit=200_000),
    text_length=512,
    max_prompt=256,
    max_response=256,
    stages=(
        Stage(
            algorithm=SFT(),
            steps=1_170,  # 3 epochs of 12,500 rows
            batch_size=32,
            optimiser=Optimiser(learning_rate=1e-5, schedule="cosine", learning_rate_min=1e-7, weight_decay=1e-2),
        ),
        Stage(
            algorithm=MiniLLM(rollouts=256, epochs=4, teacher_share=0.2),
            steps=5_000,
            batch_size=64,
            optimiser=Optimiser(learning_rate=5e-6, schedule="cosine", warmup_steps=100, weight_decay=1e-6),
        ),
    ),
    rollout=RolloutConfig(replicas=2, gpus=1),
    teachers=TeacherConfig(replicas=2, gpus=1),
    learner=LearnerConfig(ranks=4, gpus=1, zero_stage=3, micro_batch=4, activation_checkpointing=True),
    evaluation=EvaluationConfig(prompts=1_000, every=500),
    checkpoint_every=500,
    seed=10,
)


def tiny() -> Experiment:
    """The same run at toy size, on a language that every machine can write."""
    import spoken_dates

    language = spoken_dates.write(Path(tempfile.mkdtemp(prefix="raykd-")), rows=600)
    sft, minillm = EXPERIMENT.stages
    on_cpu = EngineConfig(dtype="float32", cpu_cache_gib=0.25)

    def llama(hidden: int, layers: int) -> Model:
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
        }
        fixed = {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": False}
        return Model(path=str(language.tokenizer), scratch=fixed | shape)

    return EXPERIMENT.model_copy(
        update={
            "name": "minillm-llama-tiny",
            "teacher": llama(64, 2),
            "student": llama(32, 1),
            "data": Pairs(path=str(language.pairs)),
            "text": Documents(path=str(language.texts)),
            "text_length": 40,
            "max_prompt": 16,
            "max_response": 16,
            "stages": (
                sft.model_copy(update={"steps": 2, "batch_size": 8}),
                minillm.model_copy(update={"steps": 4, "batch_size": 8, "algorithm": MiniLLM(rollouts=16, epochs=2)}),
            ),
            "rollout": EXPERIMENT.rollout.model_copy(update={"gpus": 0, "engine": on_cpu}),
            "teachers": EXPERIMENT.teachers.model_copy(update={"gpus": 0, "dtype": "float32", "engine": on_cpu}),
            "learner": EXPERIMENT.learner.model_copy(update={"gpus": 0, "dtype": "float32"}),
            "evaluation": EvaluationConfig(prompts=8),
            "tracking": TrackingConfig(wandb=False),
            "checkpoint_every": 0,
        }
    )


if __name__ == "__main__":
    main(EXPERIMENT, scales={"tiny": tiny})
