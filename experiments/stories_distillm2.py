"""DistiLLM-2: skew forward KL on the teacher's answers, skew reverse KL on the student's to the same prompts.

Look at beta, which leaves the teacher's text out within the first third, and at alpha, which moves from the second third on.
"""

from stories import stories

from raykd.algorithms import DistiLLM2
from raykd.cli import main

EXPERIMENT = stories(DistiLLM2())

if __name__ == "__main__":
    main(EXPERIMENT)
