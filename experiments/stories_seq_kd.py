"""Sequence-level distillation: fine-tuning on stories that the teacher writes, token ids alone.

Look at sampled_forward_kl of every step, log p - log q of the teacher's own stories.
"""

from stories import stories

from raykd.algorithms import SeqKD
from raykd.cli import main

EXPERIMENT = stories(SeqKD())

if __name__ == "__main__":
    main(EXPERIMENT)
