"""GKD on Dolly, GPT-2 0.1B from 1.5B, the row in which it is compared with MiniLLM and DistiLLM; four GPUs.

    Dolly Rouge-L (arXiv 2503.07067)     on-policy   batched   off-policy
    GKD                                      23.75     23.21        22.89
    MiniLLM                                  23.84     23.75        23.41
    DistiLLM                                 26.12     26.11        26.12

JSD(0.9) on the student's own responses, the form that GKD's paper (arXiv 2306.13649) recommends for sampled decoding; its own
rows are T5's, see README.md. Initial SFT, rate and epochs are those of the public baseline script (jongwooko/distillm).
"""

from dolly import SMALL, dolly, epochs, first_sft

from raykd.algorithms import GKD
from raykd.cli import main

EXPERIMENT = dolly(
    "gkd-gpt2-0.1B",
    first_sft(5e-4),
    epochs(GKD(), 20, learning_rate=5e-4),
    student="gpt2",
    teacher="MiniLLM/teacher-gpt2-1.5B",
    layout=SMALL,
)

if __name__ == "__main__":
    main(EXPERIMENT)
