"""Supervised fine-tuning on the stories: the control. As many steps as the other files have; the teacher only measures.

Look at both KLs: what the other files gain has to be more than this.
"""

from stories import stories

from raykd.algorithms import SFT
from raykd.cli import main

EXPERIMENT = stories(SFT())

if __name__ == "__main__":
    main(EXPERIMENT)
