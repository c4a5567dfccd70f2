"""AKL's LLaMA row: TinyLLaMA 1.1B from LLaMA 7B, on the data set's responses; eight GPUs.

The teacher, fine-tuned on Dolly, is made first: ``python experiments/sft_dolly.py --scale llama-7B``. The paper's numbers
(arXiv 2404.02657), rate and epochs are not known here; MiniLLM's for students of this size stand in.
"""

from dolly import LARGE, dolly, epochs, fine_tuned

from raykd.algorithms import AKL
from raykd.cli import main

EXPERIMENT = dolly(
    "akl-tinyllama-1.1B",
    epochs(AKL(), 10, learning_rate=5e-5),
    student="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    teacher=fine_tuned("llama-7B"),
    layout=LARGE,
)

if __name__ == "__main__":
    main(EXPERIMENT)
