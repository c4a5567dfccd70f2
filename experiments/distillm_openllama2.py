"""DistiLLM's OpenLLaMA2 row: 3B from 7B; eight GPUs.

The teacher, fine-tuned on Dolly, is made first: ``python experiments/sft_dolly.py --scale openllama2-7B``.

    Rouge-L, by others (CVenginner/ICML-rebuttal)     Dolly  SelfInst  Vicuna    S-NI    UnNI
    SFT                                               24.54     16.80   16.15   29.29   27.43
    DistiLLM                                          28.24     21.00   19.12   37.06   35.05

The public script (jongwooko/distillm) trains LoRA of rank 16 at 5e-4; all weights are trained here, at MiniLLM's 1e-5 for
LLaMA 7B. Its epochs, batch and schedule, which begins at a share of 0.2 with a tolerance of 0.2, are kept. A user reports
that the script does not reproduce the row (jongwooko/distillm#15).
"""

from dolly import LARGE, dolly, epochs, fine_tuned, first_sft

from raykd.algorithms import AdaptiveSchedule, DistiLLM
from raykd.cli import main

SCHEDULE = AdaptiveSchedule.code().model_copy(update={"start": 0.2, "tolerance": 0.2})
EXPERIMENT = dolly(
    "distillm-openllama2-3B",
    first_sft(1e-5),
    epochs(DistiLLM(schedule=SCHEDULE, text_coefficient=1.0), 10, learning_rate=1e-5),
    student="openlm-research/open_llama_3b_v2",
    teacher=fine_tuned("openllama2-7B"),
    layout=LARGE,
)

if __name__ == "__main__":
    main(EXPERIMENT)
