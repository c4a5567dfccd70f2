"""The whole system in minutes on a laptop: no network, no account, no data to bring.

A small Llama learns to say dates in English (spoken_dates.py); every date has several right answers, and every answer can be
checked. A student a third of its size has worse data: three in ten of its reference answers belong to another date. It gets SFT
on them, then MiniLLM on responses mixed with the teacher's. A control gets as many steps of SFT alone.
"""

import argparse
import os
from pathlib import Path

import quickstart_report
import spoken_dates
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
from raykd.run import run
from raykd.sources import Pairs

WORK = Path(os.environ.get("RAYKD_RUNS", "runs")) / "quickstart-data"
TEACHER_STEPS, SFT_STEPS, DISTIL_STEPS = 700, 550, 96


def llama(hidden: int, layers: int) -> dict[str, object]:
    """A small Llama's architecture; heads are 32 wide."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console()
    language = spoken_dates.write(WORK, rows=50_000)
    common = {
        "max_prompt": 16,
        "max_response": 24,
        "rollout": RolloutConfig(engine=EngineConfig(dtype="float32")),
        "teachers": TeacherConfig(dtype="float32", engine=EngineConfig(dtype="float32")),
        "learner": LearnerConfig(dtype="float32", micro_batch=64, chunk=2048, threads=2),
    }

    def sft(steps: int) -> Stage:
        schedule = Optimiser(learning_rate=6e-3, schedule="cosine", warmup_steps=20)
        return Stage(algorithm=SFT(), steps=steps, batch_size=64, optimiser=schedule)

    console.rule("1. a teacher learns the language from right answers")
    teacher = run(
        Experiment(
            name="quickstart-teacher",
            student=Model(path=str(language.tokenizer), scratch=llama(96, 3)),
            data=Pairs(path=str(language.pairs)),
            stages=(sft(TEACHER_STEPS),),
            evaluation=EvaluationConfig(prompts=0),
            **common,
        ),
        console=console,
    )
    distil = Stage(
        algorithm=MiniLLM(rollouts=128, epochs=2, text_coefficient=0),  # nothing else to forget, so no plain text
        steps=DISTIL_STEPS,
        batch_size=64,
        optimiser=Optimiser(learning_rate=2e-3, schedule="cosine"),
    )
    pair = {
        "student": Model(path=str(language.tokenizer), scratch=llama(64, 2)),
        "teacher": Model(path=str(teacher.student)),
        "data": Pairs(path=str(language.noisy)),
        "evaluation": EvaluationConfig(prompts=128),
        **common,
    }
    console.rule("2. a student with worse data: SFT, then MiniLLM with teacher-mixed sampling")
    distilled = run(Experiment(name="quickstart", stages=(sft(SFT_STEPS), distil), **pair), console=console)
    console.rule("3. the control: as many steps of SFT alone")
    control = run(Experiment(name="quickstart-control", stages=(sft(SFT_STEPS + DISTIL_STEPS),), **pair), console=console)
    quickstart_report.show(console, distilled, control, teacher.student)


if __name__ == "__main__":
    main()
