"""DistiLLM's OPT rows: 0.1B, 0.3B and 1.3B from 2.7B. ``--scale 1.3B`` chooses the student; four GPUs.

The teacher, OPT-2.7B fine-tuned on Dolly, is made first: ``python experiments/sft_dolly.py --scale opt-2.7B``.

Settings of the public scripts (jongwooko/distillm): SFT of 3 epochs, then 20 (1.3B: 10) of skew reverse KL, all at 5e-5 in
batches of 32, and the code's adaptive schedule, validated once an epoch. The paper's numbers (arXiv 2402.03898) are not known
here.
"""

from functools import partial

from dolly import SMALL, dolly, epochs, fine_tuned, first_sft

from raykd.algorithms import DistiLLM
from raykd.cli import main
from raykd.experiment import Experiment

STUDENTS = {"0.1B": ("facebook/opt-125m", 20), "0.3B": ("facebook/opt-350m", 20), "1.3B": ("facebook/opt-1.3b", 10)}


def of_size(size: str) -> Experiment:
    student, count = STUDENTS[size]
    stages = first_sft(5e-5), epochs(DistiLLM.code(), count, learning_rate=5e-5)
    return dolly(
        f"distillm-opt-{size}",
        *stages,
        student=student,
        teacher=fine_tuned("opt-2.7B"),
        layout=SMALL,
    )


SCALES = {size: partial(of_size, size) for size in STUDENTS}
EXPERIMENT = of_size("0.1B")

if __name__ == "__main__":
    main(EXPERIMENT, scales=SCALES)
