"""DistiLLM: skew reverse KL from the first step on, without fine-tuning before it, in as many steps as the others have in all.

Look at student_share, which rises when the held-out loss does, and at dataset_share and replayed_share: whose text a step had.
"""

from stories import SFT_STEPS, STEPS, from_nothing, stories

from raykd.algorithms import AdaptiveSchedule, DistiLLM
from raykd.cli import main

METHOD = DistiLLM(schedule=AdaptiveSchedule(start=0.2, tolerance=0.0))
EXPERIMENT = stories("distillm", from_nothing(METHOD, SFT_STEPS + STEPS), measure_every=24)

if __name__ == "__main__":
    main(EXPERIMENT)
