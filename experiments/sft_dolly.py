"""Fine-tuning on Dolly: the SFT rows of MiniLLM's tables, and the teachers that are not on the Hub. ``--scale SIZE`` chooses.

Dolly Rouge-L (arXiv 2306.08543): gpt2-120M 23.3, gpt2-760M 25.4, gpt2-1.5B 27.6 (a teacher), opt-1.3B 26.0, opt-6.7B 27.6,
opt-13B 29.2 (a teacher), llama-7B 26.3, llama-13B 29.7 (a teacher). Rates and epochs are those of the public scripts
(microsoft/LMOps). OpenLLaMA2, whose scripts (jongwooko/distillm) fine-tune with LoRA, has LLaMA's settings: all weights are
trained here.
"""

from functools import partial
from typing import NamedTuple

from dolly import TRAINING_ONLY, dolly, epochs

from raykd.algorithms import SFT
from raykd.cli import main
from raykd.experiment import Experiment


class Row(NamedTuple):
    model: str
    learning_rate: float
    epochs: int


ROWS = {
    "gpt2-120M": Row("gpt2", 5e-4, 20),
    "gpt2-340M": Row("gpt2-medium", 1e-4, 20),
    "gpt2-760M": Row("gpt2-large", 1e-4, 10),
    "gpt2-1.5B": Row("gpt2-xl", 5e-5, 10),
    "opt-1.3B": Row("facebook/opt-1.3b", 5e-5, 10),
    "opt-2.7B": Row("facebook/opt-2.7b", 5e-5, 10),
    "opt-6.7B": Row("facebook/opt-6.7b", 1e-5, 10),
    "opt-13B": Row("facebook/opt-13b", 1e-5, 10),
    "llama-7B": Row("huggyllama/llama-7b", 1e-5, 10),
    "llama-13B": Row("huggyllama/llama-13b", 1e-5, 10),
    "openllama2-3B": Row("openlm-research/open_llama_3b_v2", 1e-5, 10),
    "openllama2-7B": Row("openlm-research/open_llama_7b_v2", 1e-5, 10),
}


def of_size(size: str) -> Experiment:
    row = ROWS[size]
    stage = epochs(SFT(), row.epochs, row.learning_rate)
    return dolly(f"sft-{size}", stage, student=row.model, teacher=None, layout=TRAINING_ONLY)


SCALES = {size: partial(of_size, size) for size in ROWS}
EXPERIMENT = of_size("gpt2-120M")

if __name__ == "__main__":
    main(EXPERIMENT, scales=SCALES)
