"""Supervised fine-tuning on the stories: the control. As many steps as every other file here, and no teacher.

Look at what it leaves: the forward KL on stories falls, the reverse KL on the student's own text less.
"""

from stories import stories

from raykd.algorithms import SFT
from raykd.cli import main

EXPERIMENT = stories(SFT())

if __name__ == "__main__":
    main(EXPERIMENT)
