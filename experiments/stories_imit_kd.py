"""Imitation: forward KL, half of it on the stories, half on what the student writes.

Look at it beside stories_kd.py: the same divergence, but the student meets its own mistakes.
"""

from stories import stories

from raykd.algorithms import ImitKD
from raykd.cli import main

EXPERIMENT = stories(ImitKD())

if __name__ == "__main__":
    main(EXPERIMENT)
