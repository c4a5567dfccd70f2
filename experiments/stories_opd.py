"""On-policy distillation from sampled tokens: the teacher sends one number a token, and its log-ratio is the advantage.

Look at sampled_reverse_kl of every step, and at how far the exact divergence of stories_gkd.py gets in as many steps.
"""

from stories import stories

from raykd.algorithms import OPD
from raykd.cli import main

EXPERIMENT = stories(OPD())

if __name__ == "__main__":
    main(EXPERIMENT)
