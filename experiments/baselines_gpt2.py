"""The baselines of MiniLLM's GPT-2 table: word-level and sequence-level distillation, GPT-2 120M from 1.5B. ``--scale`` chooses.

    Rouge-L (arXiv 2306.08543)     Dolly  SelfInst  Vicuna   S-NI   UnNI
    kd                              22.8      10.8    13.4   19.7   22.0
    seq_kd                          22.7      10.1    14.3   16.4   18.8
    SFT (sft_dolly.py)              23.3      10.0    14.7   16.3   18.5

Settings of the public scripts (microsoft/LMOps): half cross-entropy on the data, half forward KL to the teacher; rate and epochs
as for SFT. Their seq_kd learns in all epochs from one response a prompt, written beforehand; here the teacher writes new ones.
"""

from functools import partial

from dolly import SMALL, dolly, epochs

from raykd.algorithms import KD, SeqKD
from raykd.cli import main
from raykd.experiment import Experiment

METHODS = {"kd": KD(data_weight=0.5), "seq_kd": SeqKD()}


def baseline(method: str) -> Experiment:
    stage = epochs(METHODS[method], 20, learning_rate=5e-4)
    return dolly(f"{method}-gpt2-120M", stage, student="gpt2", teacher="MiniLLM/teacher-gpt2-1.5B", layout=SMALL)


SCALES = {method: partial(baseline, method) for method in METHODS}
EXPERIMENT = baseline("kd")

if __name__ == "__main__":
    main(EXPERIMENT, scales=SCALES)
