"""AKL's GPT-2 row: 120M from 1.5B, on the data set's responses; four GPUs.

    Rouge-L                                          Dolly  SelfInst  Vicuna    S-NI    UnNI
    AKL, arXiv 2404.02657 as quoted by others         23.9                      19.2
    AKL, by others (CVenginner/ICML-rebuttal)        23.83     10.87   15.63   20.07   21.97
    forward KL, there                                23.80     10.01   15.25   17.69   18.99
    reverse KL, there                                24.77     12.02   15.06   23.27   26.01

The paper's rate and epochs are not known here. Its code is a loss to be put into MiniLLM's script for distillation, whose
settings at this size stand in, without that script's half of cross-entropy. ``--stages.0.algorithm.boundary prefix`` is the
code's head.
"""

from dolly import SMALL, dolly, epochs

from raykd.algorithms import AKL
from raykd.cli import main

EXPERIMENT = dolly(
    "akl-gpt2-120M",
    epochs(AKL(), 20, learning_rate=5e-4),
    student="gpt2",
    teacher="MiniLLM/teacher-gpt2-1.5B",
    layout=SMALL,
)

if __name__ == "__main__":
    main(EXPERIMENT)
