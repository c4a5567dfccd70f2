"""Word-level distillation: forward KL to the teacher's distribution at every position of the stories.

Look at the forward KL, which it minimises on exactly the text that it is measured on.
"""

from stories import stories

from raykd.algorithms import KD
from raykd.cli import main

EXPERIMENT = stories(KD())

if __name__ == "__main__":
    main(EXPERIMENT)
