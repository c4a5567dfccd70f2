"""What every metric means, its unit, and what to look for. A metric that is not here is shown under its own name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

NATS = "nats per token"


@dataclass(frozen=True, slots=True)
class Meaning:
    """How a metric is shown."""

    title: str
    unit: str
    look: str
    """What to look for."""
    may_be_log: bool = False
    """Whether a logarithmic axis is right where the values span a wide range."""


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that belong together."""

    title: str
    intro: str
    metrics: Mapping[str, Meaning]


HELD_OUT = Section(
    "Held-out quality",
    "Measured on prompts that are never trained on: this is the result. A nat is 1.44 bits.",
    {
        "reverse_kl": Meaning(
            "Reverse KL on own answers",
            NATS,
            "KL(student ‖ teacher): how unlikely the teacher finds what the student writes. Lower is better; 0 is the teacher "
            "itself.",
            True,
        ),
        "forward_kl": Meaning(
            "Forward KL on references",
            NATS,
            "KL(teacher ‖ student): how much of what the teacher would say the student misses. Lower is better. Methods that "
            "minimise reverse KL may let it rise.",
            True,
        ),
        "loss": Meaning(
            "Cross-entropy on references",
            NATS,
            "Lower is better where the references are good. It may rise while the KLs fall: then the student follows the "
            "teacher, not the data.",
            True,
        ),
        "rouge_l": Meaning(
            "Rouge-L to the references", "of 100", "One sample a prompt. Higher is better where the references are good."
        ),
        "distinct_4": Meaning(
            "Different 4-grams", "percent", "Of all the answers' together. A fall says that the answers grow alike."
        ),
        "measuring_seconds": Meaning(
            "Time to measure", "seconds", "The learner waits for it; fewer evaluation.prompts cost less."
        ),
        "response_length": Meaning(
            "Answer length", "tokens", "A falling KL means little while answers grow much shorter or longer."
        ),
        "cut_share": Meaning("Answers cut at the limit", "share", "Near 1, the student does not know how to end."),
        "empty_share": Meaning("Empty answers", "share", "Should stay near 0: an empty answer is cheap, and useless."),
    },
)

LOSS = Meaning(
    "Training loss",
    "nats",
    "What the optimiser minimises; comparable between runs of this method alone. Policy-gradient losses need not fall: see the "
    "held-out KLs.",
    True,
)
LOSS_PREFIX = "loss of "

TRAINING = Section(
    "Training",
    "On the responses that each step learned from. Lines of long runs are means over a few steps, bands their range.",
    {
        "divergence": Meaning("Divergence from the teacher", NATS, "The method's own divergence; should fall.", True),
        "reverse_kl": Meaning("Reverse KL, whole distribution", NATS, "At the positions of the batch; should fall.", True),
        "sampled_reverse_kl": Meaning(
            "Sampled reverse KL", NATS, "log q - log p of the sampled tokens: an estimate of reverse KL. Should fall towards 0."
        ),
        "sampled_forward_kl": Meaning(
            "Sampled forward KL", NATS, "log p - log q of the teacher's tokens: an estimate of forward KL. Should fall towards 0."
        ),
        "nll": Meaning(
            "Negative log-likelihood",
            NATS,
            "Of the text of each step. On data it should fall. On the student's own text it is what the student thinks of "
            "itself: near 0, it says one thing only.",
            True,
        ),
        "entropy": Meaning(
            "Entropy of the student",
            NATS,
            "How many ways it sees to go on. A fall to 0 is collapse; a rise without end is forgetting.",
        ),
        "policy_loss": Meaning("Policy-gradient part of the loss", "nats", "A surrogate: its gradient matters, not its height."),
        "advantage": Meaning("Advantage", "nats", "What the loss multiplies with: above 0 it pushes a token up, below 0 down."),
        "advantage_mean": Meaning("Mean return", "nats", "Rises as the teacher finds the answers likelier."),
        "advantage_std": Meaning("Spread of the returns", "nats", "A few huge returns make training noisy."),
        "reward": Meaning("Reward", "as given", "What the experiment's own reward says; should rise."),
    },
)

TEXT = Section(
    "Whose text, and how long",
    "The responses in each batch.",
    {
        "response_length": Meaning("Response length", "tokens", "Sudden change is a warning; the end token counts."),
        "cut_share": Meaning("Cut at the limit", "share", "Responses that did not end by themselves."),
        "empty_share": Meaning("Empty", "share", "Responses without a token besides the end."),
        "dataset_share": Meaning("From the data set", "share", "The rest was written by the student, the teacher, or both."),
        "student_share": Meaning("Share of student text", "share", "DistiLLM raises it when the held-out loss rises."),
    },
)

OFF_POLICY = Section(
    "How far off-policy",
    "The responses were written by earlier weights than those that learn from them.",
    {
        "importance_weight": Meaning(
            "Importance weight", "ratio", "Mean of learner's over writer's probability. Around 1 is healthy."
        ),
        "logprob_mismatch": Meaning(
            "Mismatch of learner and engine",
            "nats a token",
            "Mean distance of their log-probs, over tokens that an engine wrote. On new text rounding alone; a jump is an error.",
        ),
        "effective_sample_share": Meaning(
            "Effective share of the sample",
            "share",
            "(mean weight)² / mean of squared weights. Near 1, all tokens count; near 0, a few decide everything.",
        ),
        "clip_fraction": Meaning(
            "Clipped tokens",
            "share",
            "Tokens that the clip keeps from learning. Above about 0.3, take fewer epochs or smaller steps.",
        ),
        "staleness": Meaning("Staleness", "optimiser steps", "Mean age of the weights that wrote the batch."),
        "replayed_share": Meaning("Replayed", "share", "Responses older than one step."),
    },
)

OPTIMISER = Section(
    "Optimiser and schedules",
    "",
    {
        "grad_norm": Meaning("Gradient norm", "before clipping", "Spikes far above the usual height are steps to look at.", True),
        "learning_rate": Meaning("Learning rate", "", "The schedule of each stage."),
        "skipped": Meaning(
            "Skipped steps", "1 = skipped", "A step whose gradient was not finite, or absurdly large, changes nothing."
        ),
        "alpha": Meaning("Skew alpha", "", "Share of the other model in the skewed mixture."),
        "beta": Meaning("Beta", "", "Weight of the student's text beside the teacher's."),
        "alpha_curriculum": Meaning("Curriculum of alpha", "1 = on", "On from the second epoch."),
        "gap/student": Meaning("Probability gap, student's text", "probability", "Teacher and student agree where it is 0."),
        "gap/teacher": Meaning("Probability gap, teacher's text", "probability", "Teacher and student agree where it is 0."),
    },
)

OTHER = Section("Other numbers", "Logged by the run; this report has no description of them.", {})

SECTIONS = (TRAINING, TEXT, OFF_POLICY, OPTIMISER, OTHER)

ON_TEXT = ("sft/nll", "kd/divergence", "kd/nll", "kd/entropy")
"""What the loss on plain text says, under the name of its algorithm."""

NOT_SHOWN = frozenset({"step", "importance_weight_squared", "step_seconds", "elapsed_seconds"})
"""The axis, or part of another number."""

VERBS = {
    "generate": "writing responses",
    "score": "the teacher reads them",
    "rate": "the reward rates them",
    "learn": "optimiser steps",
    "publish": "giving out the new weights",
    "evaluate": "the learner's part of held-out measures",
    "save": "the learner's part of a checkpoint",
    "load": "taking in the new weights",
    "sleep": "giving GPU memory back",
    "wait": "the learner waits for responses",
}

MEASURES = {
    "rouge_l": "Rouge-L to the reference, 0 to 100; higher is better. Below, by the tokens of the reference.",
    "rouge_l_to_teacher": "Rouge-L to the teacher's answer, 0 to 100; higher is closer.",
    "bleu": "BLEU, 0 to 100; higher is better.",
    "exact_match": "Percent of answers with the right number.",
    "length": "Answer length, tokens.",
    "cut": "Percent of answers cut at the limit.",
    "distinct_4": "Percent of different 4-grams; higher is more diverse.",
    "self_bleu": "BLEU of answers to the same prompt against each other, 0 to 100; lower is more diverse.",
    "test_loss": "Cross-entropy on reference answers, nats per token.",
    "forward_kl": "KL(teacher ‖ student) on reference answers, nats per token; lower is better.",
    "reverse_kl": "KL(student ‖ teacher) on the student's own answers, nats per token; lower is better.",
    "excess_error": "ExAccErr at the longest length, percent: what the student's own prefixes cost; 0 is no exposure bias.",
    "accuracy": "Percent of right labels.",
    "ece": "Expected calibration error; 0 is calibrated.",
    "judge_score": "Percent of the reference's rating by the judge.",
    "judge_win_rate": "Percent of answers that the judge prefers to the reference.",
    "judge_unrated": "Percent of answers without a usable rating.",
}


def find(name: str) -> tuple[Section, Meaning]:
    """Where and how a metric of a step is shown; ``sft/nll`` is the nll of the loss term on plain text."""
    if name.startswith(LOSS_PREFIX):
        return TRAINING, replace(LOSS, title=f"{LOSS.title}: {name.removeprefix(LOSS_PREFIX)}")
    term, _, rest = name.rpartition("/")
    for section in SECTIONS:
        if name in section.metrics:
            return section, section.metrics[name]
        if term and rest in section.metrics:
            meaning = section.metrics[rest]
            return section, replace(meaning, title=f"{meaning.title}, on plain text ({term})")
    return OTHER, Meaning(name, "", "")


def rank(name: str) -> tuple[bool, int]:
    """Sorts the metrics of a section: losses, then in the order of description, then those without."""
    described = list(find(name)[0].metrics)
    return not name.startswith(LOSS_PREFIX), described.index(name) if name in described else len(described)
