"""MiniLLM's OPT rows: 1.3B, 2.7B and 6.7B from 13B. ``--scale 6.7B`` chooses the student; eight GPUs.

    Rouge-L (arXiv 2306.08543)     Dolly  SelfInst  Vicuna   S-NI   UnNI
    teacher 13B                     29.2      18.4    17.8   30.4   36.1
    1.3B  SFT                       26.0      11.4    15.6   23.1   28.4
    1.3B  MiniLLM                   26.7      14.8    17.9   28.6   33.4
    6.7B  SFT                       27.6      16.4    17.8   30.3   28.6
    6.7B  MiniLLM                   29.0      17.5    18.7   32.5   36.7

Settings as for GPT-2, see minillm_gpt2.py. The paper's plain text is the RoBERTa corpus; OpenWebText stands here.
"""

from functools import partial

from dolly import LARGE, dolly, first_sft, minillm

from raykd.cli import main
from raykd.experiment import Experiment

STUDENTS = {"1.3B": ("facebook/opt-1.3b", 5e-5), "2.7B": ("facebook/opt-2.7b", 5e-5), "6.7B": ("facebook/opt-6.7b", 1e-5)}


def of_size(size: str) -> Experiment:
    student, learning_rate = STUDENTS[size]
    stages = first_sft(learning_rate), minillm("constant")
    return dolly(f"minillm-opt-{size}", *stages, student=student, teacher="MiniLLM/teacher-OPT-13B", layout=LARGE)


SCALES = {size: partial(of_size, size) for size in STUDENTS}
EXPERIMENT = of_size("1.3B")

if __name__ == "__main__":
    main(EXPERIMENT, scales=SCALES)
