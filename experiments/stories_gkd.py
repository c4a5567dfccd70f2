"""Generalised distillation: the Jensen-Shannon divergence at beta 0.9, close to reverse KL, on the student's own text.

Look at the reverse KL. ``--stages.1.algorithm.student-share 0.5`` learns from the stories as well.
"""

from stories import stories

from raykd.algorithms import GKD
from raykd.cli import main

EXPERIMENT = stories(GKD())

if __name__ == "__main__":
    main(EXPERIMENT)
