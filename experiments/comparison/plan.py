"""What is compared: the variants, and the runs in the order of what is worth most."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from stories import stories

from comparison.gaps import GAPS
from comparison.pairs import PAIRS, START, TEACHER, TEACHER_TEXT, TEXT
from raykd.algorithms import GKD, SFT, AdaptiveSchedule, AnyAlgorithm, DistiLLM
from raykd.algorithms.token_divergences import ForwardKL, Jeffreys, ReverseKL, SkewForwardKL, SkewReverseKL
from raykd.experiment import Experiment, Model, Optimiser, Stage, TrackingConfig
from raykd.report.folders import EVALUATION

HEADS = "head_and_tail"
BEFORE = {TEACHER_TEXT: None, TEXT: None, TEACHER: TEACHER_TEXT, START: TEXT}
"""Where a pair has it, what each of them goes on from; everything else from START."""
SEEDS = (0, 1, 2)
LAST_WRITTEN = "tokenizer_config.json"
"""In the student's folder."""
MEASURE_EVERY = 16
LONG = 240
"""Steps of the methods without generation where they get as much time as those with it."""

METHODS: dict[str, AnyAlgorithm] = {
    name: import_module(f"stories_{name}").EXPERIMENT.stages[-1].algorithm
    for name in ("sft", "seq_kd", "kd", "imit_kd", "gkd", "minillm", "akl", "distillm", "distillm2", "opd")
}
"""With the settings of their files."""

MINILLM = METHODS["minillm"]
ABLATIONS: dict[str, AnyAlgorithm] = {
    "minillm_no_length_norm": MINILLM.model_copy(update={"length_normalise": False}),
    "minillm_no_mixing": MINILLM.model_copy(update={"teacher_share": 0.0}),
    "minillm_no_single_step": MINILLM.model_copy(update={"single_step": False, "include_current_reward": True}),
    "gkd_half": GKD(student_share=0.5),
    "gkd_data": GKD(student_share=0.0),
    "forward_kl_student": GKD(divergence=ForwardKL()),
    "reverse_kl_data": GKD(divergence=ReverseKL(), student_share=0.0),
    "jeffreys_data": GKD(divergence=Jeffreys(), student_share=0.0),
    "skew_forward_data": GKD(divergence=SkewForwardKL(), student_share=0.0),
    "skew_reverse_data": GKD(divergence=SkewReverseKL(), student_share=0.0),
    "skew_reverse_student": GKD(divergence=SkewReverseKL()),
    "skew_reverse_replay": DistiLLM(schedule=AdaptiveSchedule(start=1.0, step=0.0)),
}
"""What docs/comparison.md sets beside the methods, one field apart from one of them."""

LONG_RUNS = {f"{name}_long": METHODS[name] for name in ("sft", "kd", "akl", "distillm")}
ON_DOLLY = ("kd", "akl", "gkd", "minillm", "distillm", "sft", "seq_kd")
"""The methods of the papers' tables."""
VARIANTS: dict[str, AnyAlgorithm] = {START: SFT(), **METHODS, **ABLATIONS, **LONG_RUNS}


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the comparison."""

    pair: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.pair}-{self.seed}"

    @property
    def folder(self) -> Path:
        return stories(SFT()).runs / "compare" / self.name

    @property
    def student(self) -> Path:
        """What it leaves."""
        given = PAIRS[self.pair].teacher if self.variant == TEACHER else None
        return Path(given) if given else self.folder / "student"

    @property
    def teacher(self) -> str:
        """The teacher's folder."""
        return str(Entry(self.pair, TEACHER, SEEDS[0]).student)

    @property
    def begins_with(self) -> "Entry | None":
        """The run that this one goes on from; None: from random weights."""
        before = BEFORE.get(self.variant, START)
        return Entry(self.pair, before, self.seed) if before == START or before in PAIRS[self.pair].made else None

    @property
    def needs(self) -> list["Entry"]:
        """What must be trained before."""
        taught = self.variant not in (TEACHER, *PAIRS[self.pair].made)
        needed = [self.begins_with, Entry(self.pair, TEACHER, SEEDS[0]) if taught else None]
        return [entry for entry in needed if entry]

    @property
    def trained(self) -> bool:
        return self.variant == HEADS or (self.student / LAST_WRITTEN).is_file()  # which has nothing to train

    @property
    def ready(self) -> bool:
        return all(entry.trained for entry in self.needs)

    @property
    def finished(self) -> bool:
        if self.variant in (TEACHER_TEXT, TEXT):  # which nobody measures
            return self.trained
        return (self.folder / (GAPS if self.variant == HEADS else EVALUATION)).is_file()


def plan() -> list[Entry]:
    """Every run; what is worth most for its time comes first."""

    def of(pair: str, variants: Iterable[str], seeds: Sequence[int] = SEEDS) -> list[Entry]:
        return [Entry(pair, variant, seed) for seed in seeds for variant in variants]

    first, second, third = ((seed,) for seed in SEEDS)
    return [
        *of("dolly", [TEACHER_TEXT, TEACHER], first),  # what takes longest to make begins
        *of("fifth", [TEACHER], first),
        *of("fifth", [START, *METHODS]),
        *of("fifth", [HEADS, *ABLATIONS], first),
        *of("dolly", [TEXT, START, *ON_DOLLY], first),
        *of("fifth", [HEADS, *ABLATIONS], second),
        *of("dolly", [TEXT, START, *ON_DOLLY], second),
        *of("fifth", [HEADS, *ABLATIONS], third),
        *of("dolly", [TEXT, START, *ON_DOLLY], third),
        *of("half", [TEACHER], first),
        *of("half", [START, *METHODS]),
        *of("fifth", LONG_RUNS),
    ]


def experiment(entry: Entry) -> Experiment:
    """The run of an entry."""
    pair = PAIRS[entry.pair]
    changes = {"name": entry.name, "seed": entry.seed, "runs": entry.folder.parent, "tracking": TrackingConfig(wandb=False)}
    if entry.begins_with:
        changes["student"] = Model(path=str(entry.begins_with.student))
    if entry.variant in pair.made:
        return pair.made[entry.variant].model_copy(update=changes | {"checkpoint_every": MEASURE_EVERY})
    base = pair.experiment(VARIANTS[entry.variant], 0 if entry.variant in ABLATIONS else MEASURE_EVERY)
    fine_tuning, method = base.stages
    changes["teacher"] = Model(path=entry.teacher)
    evaluation = base.evaluation.model_copy(update={"samples": 0})
    if entry.variant == START:
        changes |= {"stages": (fine_tuning,), "text": None, "evaluation": evaluation.model_copy(update={"every": 0})}
        return base.model_copy(update=changes)
    stage = Stage(
        algorithm=method.algorithm,
        steps=LONG if entry.variant in LONG_RUNS else method.steps,
        batch_size=method.batch_size,
        optimiser=Optimiser(learning_rate=1e-3, warmup_steps=8),
    )
    text = base.text if method.algorithm.text else None
    changes |= {"stages": (stage,), "text": text, "evaluation": evaluation, "checkpoint_every": MEASURE_EVERY}
    return base.model_copy(update=changes)
