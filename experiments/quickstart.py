"""The whole system in minutes on a laptop: no network, no account, no data to bring.

A small Llama learns to write the summary line of a function from its signature (Python's own standard library). A student
with a tenth of its parameters is then distilled from it: SFT on the data, then MiniLLM on teacher-mixed responses.
A control gets the same number of SFT steps instead.
"""

import os
from pathlib import Path

import quickstart_report
import standard_library
from rich.console import Console

from raykd.algorithms import SFT, MiniLLM
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
from raykd.prompts import Documents, Pairs
from raykd.run import run

WORK = Path(os.environ.get("RAYKD_RUNS", "runs")) / "quickstart-data"
SFT_STEPS, DISTIL_STEPS = 100, 48


def llama(hidden: int, layers: int, heads: int) -> dict[str, object]:
    """A small Llama's architecture."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }


def main() -> None:
    console = Console()
    console.rule("reading the standard library's docstrings")
    pairs, texts, tokenizer = standard_library.write(WORK)
    common = {
        "data": Pairs(path=str(pairs)),
        "max_prompt": 48,
        "max_response": 48,
        "rollout": RolloutConfig(engine=EngineConfig(dtype="float32")),
        "teachers": TeacherConfig(dtype="float32", engine=EngineConfig(dtype="float32")),
        "learner": LearnerConfig(dtype="float32", micro_batch=32, threads=2),
    }
    fast = Optimiser(learning_rate=2e-3, schedule="cosine", warmup_steps=10)

    console.rule("1. a teacher learns from the data")
    teacher = run(
        Experiment(
            name="quickstart-teacher",
            student=Model(path=str(tokenizer), scratch=llama(192, 4, 6)),
            stages=(Stage(algorithm=SFT(), steps=200, batch_size=32, optimiser=fast),),
            evaluation=EvaluationConfig(prompts=0),
            **common,
        ),
        console=console,
    )

    student = Model(path=str(tokenizer), scratch=llama(64, 2, 2))
    sft = Stage(algorithm=SFT(), steps=SFT_STEPS, batch_size=32, optimiser=fast)
    distil = Stage(
        algorithm=MiniLLM(rollouts=64, epochs=2),
        steps=DISTIL_STEPS,
        batch_size=32,
        optimiser=Optimiser(learning_rate=1e-3),
    )
    pair = {"student": student, "teacher": Model(path=str(teacher.student)), "text": Documents(path=str(texts)), "text_length": 96, **common}
    console.rule("2. a student is distilled: SFT, then MiniLLM with teacher-mixed sampling")
    distilled = run(Experiment(name="quickstart", stages=(sft, distil), **pair), console=console)
    console.rule("3. the control: as many steps of SFT alone")
    longer = Stage(algorithm=SFT(), steps=SFT_STEPS + DISTIL_STEPS, batch_size=32, optimiser=fast)
    control = run(Experiment(name="quickstart-control", stages=(longer,), **pair), console=console)
    quickstart_report.show(console, distilled, control, teacher.student)


if __name__ == "__main__":
    main()
