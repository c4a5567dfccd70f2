"""DistiLLM: skew reverse KL on the stories and, more and more, on what the student writes and has written before.

Look at student_share, which rises whenever the held-out loss did, and at dataset_share and replayed_share: whose text a step had.
"""

from stories import stories

from raykd.algorithms import AdaptiveSchedule, DistiLLM
from raykd.cli import main

SCHEDULE = AdaptiveSchedule(start=0.2, step=0.2, tolerance=0.0)  # 96 steps leave little time to rise
EXPERIMENT = stories(DistiLLM(schedule=SCHEDULE), measure_every=16)

if __name__ == "__main__":
    main(EXPERIMENT)
