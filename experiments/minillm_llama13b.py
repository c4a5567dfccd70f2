"""MiniLLM's LLaMA row: 7B from 13B on databricks-dolly-15k; eight GPUs of 80 GB, one actor each:

    learner   4 ranks      ZeRO-3: 7B weights, gradients and AdamW state at 18 bytes a parameter, 30 GB a rank
    teacher   2 replicas   the scorer (26 GB) beside the engine that writes the teacher's share of mixed responses (26 GB + cache)
    rollout   2 replicas   one vLLM engine each: 13.5 GB and its cache

    Rouge-L (arXiv 2306.08543)     Dolly  SelfInst  Vicuna   S-NI   UnNI
    teacher 13B                     29.7      23.4    19.4   35.8   38.5
    7B  SFT                         26.3      20.8    17.5   32.4   35.8
    7B  MiniLLM                     29.0      23.2    20.7   35.5   40.2

Settings as for GPT-2, see minillm_gpt2.py, with the code's cosine schedule. The paper's plain text is the RoBERTa corpus;
OpenWebText stands here. The teacher is the paper's own; ``python experiments/sft_dolly.py --scale llama-13B`` makes another,
whose folder ``--teacher.path`` takes.

``--scale tiny`` runs this file, layout and code path on a CPU: Llamas of a few thousand parameters, four steps.
"""

import tempfile
from pathlib import Path

from dolly import LARGE, dolly, first_sft, minillm

from raykd.algorithms import MiniLLM
from raykd.cli import main
from raykd.experiment import EngineConfig, EvaluationConfig, Experiment, Model, TrackingConfig
from raykd.sources import Documents, Pairs

EXPERIMENT = dolly(
    "minillm-llama13b",
    first_sft(1e-5),
    minillm("cosine"),
    student="huggyllama/llama-7b",
    teacher="MiniLLM/teacher-Llama-13B",
    layout=LARGE,
)


def tiny() -> Experiment:
    """The same run at toy size, on a language that every machine can write."""
    import spoken_dates

    language = spoken_dates.write(Path(tempfile.mkdtemp(prefix="raykd-")), rows=600)
    first, second = EXPERIMENT.stages
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
                first.model_copy(update={"steps": 2, "batch_size": 8}),
                second.model_copy(update={"steps": 4, "batch_size": 8, "algorithm": MiniLLM(rollouts=16, epochs=2)}),
            ),
            "rollout": EXPERIMENT.rollout.model_copy(update={"gpus": 0, "engine": on_cpu}),
            "teachers": EXPERIMENT.teachers.model_copy(update={"gpus": 0, "dtype": "float32", "engine": on_cpu}),
            "learner": EXPERIMENT.learner.model_copy(update={"gpus": 0, "dtype": "float32"}),
            "evaluation": EvaluationConfig(prompts=8, every=2),
            "tracking": TrackingConfig(wandb=False),
            "checkpoint_every": 0,
        }
    )


SCALES = {"tiny": tiny}

if __name__ == "__main__":
    main(EXPERIMENT, scales=SCALES)
