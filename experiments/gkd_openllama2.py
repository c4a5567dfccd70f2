"""GKD on Dolly, OpenLLaMA2 3B from 7B; eight GPUs.

The teacher, fine-tuned on Dolly, is made first: ``python experiments/sft_dolly.py --scale openllama2-7B``.

    Rouge-L, by others (CVenginner/ICML-rebuttal)     Dolly  SelfInst  Vicuna    S-NI    UnNI
    SFT                                               24.54     16.80   16.15   29.29   27.43
    GKD                                               26.28     18.84   17.81   30.92   29.79

JSD(0.9) on the student's own responses. The public baseline script (jongwooko/distillm) trains LoRA at 5e-4 for 10 epochs; all
weights are trained here, at MiniLLM's 1e-5 for LLaMA 7B.
"""

from dolly import LARGE, dolly, epochs, fine_tuned, first_sft

from raykd.algorithms import GKD
from raykd.cli import main

EXPERIMENT = dolly(
    "gkd-openllama2-3B",
    first_sft(1e-5),
    epochs(GKD(), 10, learning_rate=1e-5),
    student="openlm-research/open_llama_3b_v2",
    teacher=fine_tuned("openllama2-7B"),
    layout=LARGE,
)

if __name__ == "__main__":
    main(EXPERIMENT)
