"""AKL: forward and reverse KL on the stories, weighted at every position by where the student is further off.

Look at it beside stories_kd.py, which has the forward KL alone. ``--stages.1.algorithm.student-share 1`` is its on-policy form.
"""

from stories import stories

from raykd.algorithms import AKL
from raykd.cli import main

EXPERIMENT = stories(AKL())

if __name__ == "__main__":
    main(EXPERIMENT)
