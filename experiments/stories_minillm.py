"""MiniLLM: the sequence-level reverse KL by policy gradient, on responses mixed token by token with the teacher's.

Look at the reverse KL, which it minimises, together with the response length: short or empty answers lower it as well.
"""

from stories import stories

from raykd.algorithms import MiniLLM
from raykd.cli import main

EXPERIMENT = stories(MiniLLM(rollouts=64, epochs=2))

if __name__ == "__main__":
    main(EXPERIMENT)
