"""MiniLLM's GPT-2 rows: 120M, 340M and 760M from 1.5B. ``--scale 340M`` chooses the student; four GPUs.

    Rouge-L (arXiv 2306.08543)     Dolly  SelfInst  Vicuna   S-NI   UnNI
    teacher 1.5B                    27.6      14.3    16.3   27.6   31.8
    120M  SFT                       23.3      10.0    14.7   16.3   18.5
    120M  MiniLLM                   24.6      13.2    16.9   25.3   26.6     (five reruns by others: Dolly 23.8)
    760M  SFT                       25.4      12.4    16.1   21.5   27.1
    760M  MiniLLM                   26.4      15.9    18.3   29.3   37.7

Paper: SFT of 3 epochs, then 5,000 steps of 64 responses at 5e-6, 256 responses a phase. Public code (microsoft/LMOps): 4 inner
epochs, 100 steps of warm-up, then a constant rate. Rates of the fine-tuning are those of the code's SFT scripts.
"""

from functools import partial

from dolly import SMALL, dolly, first_sft, minillm

from raykd.cli import main
from raykd.experiment import Experiment

STUDENTS = {"120M": ("gpt2", 5e-4), "340M": ("gpt2-medium", 1e-4), "760M": ("gpt2-large", 1e-4)}


def of_size(size: str) -> Experiment:
    student, learning_rate = STUDENTS[size]
    stages = first_sft(learning_rate), minillm("constant")
    return dolly(f"minillm-gpt2-{size}", *stages, student=student, teacher="MiniLLM/teacher-gpt2-1.5B", layout=SMALL)


SCALES = {size: partial(of_size, size) for size in STUDENTS}
EXPERIMENT = of_size("120M")

if __name__ == "__main__":
    main(EXPERIMENT, scales=SCALES)
