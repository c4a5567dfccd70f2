"""What is compared: the variants, and the runs in the order of what is worth most."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from stories import STEPS, stories

from comparison.gaps import GAPS
from raykd.algorithms import GKD, SFT, AdaptiveSchedule, AnyAlgorithm, DistiLLM
from raykd.algorithms.gkd import ForwardKL, Jeffreys, ReverseKL, SkewForwardKL, SkewReverseKL
from raykd.experiment import Experiment, Model, Optimiser, Stage, TrackingConfig
from raykd.report.folders import EVALUATION

START, HEADS = "start", "head_and_tail"
SEEDS = (0, 1, 2)
LAST_WRITTEN = Path("student", "tokenizer_config.json")
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
VARIANTS: dict[str, AnyAlgorithm] = {START: SFT(), **METHODS, **ABLATIONS, **LONG_RUNS}


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the comparison."""

    size: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.size}-{self.seed}"

    @property
    def start(self) -> "Entry":
        """The fine-tuning whose student this run begins with."""
        return Entry(self.size, START, self.seed)

    @property
    def folder(self) -> Path:
        return stories(SFT()).runs / "compare" / self.name

    @property
    def trained(self) -> bool:
        return self.variant == HEADS or (self.folder / LAST_WRITTEN).is_file()  # which has nothing to train

    @property
    def ready(self) -> bool:
        """Whether there is a student to begin with."""
        return self.variant == START or self.start.trained

    @property
    def finished(self) -> bool:
        return (self.folder / (GAPS if self.variant == HEADS else EVALUATION)).is_file()


def plan() -> list[Entry]:
    """Every run; what is worth most for its time comes first."""

    def of(size: str, variants: Iterable[str], seeds: Sequence[int] = SEEDS) -> list[Entry]:
        return [Entry(size, variant, seed) for seed in seeds for variant in variants]

    first, others = SEEDS[:1], SEEDS[1:]
    return [
        *of("fifth", [START, *METHODS]),
        *of("fifth", [HEADS, *ABLATIONS], first),
        *of("half", [START, *METHODS], first),
        *of("fifth", LONG_RUNS, first),
        *of("fifth", [HEADS, *ABLATIONS], others),
        *of("half", [START, *METHODS], others),
        *of("fifth", LONG_RUNS, others),
    ]


def experiment(entry: Entry) -> Experiment:
    """The run of an entry."""
    base = stories(VARIANTS[entry.variant], MEASURE_EVERY, entry.size)
    fine_tuning, method = base.stages
    changes = {"name": entry.name, "seed": entry.seed, "runs": entry.folder.parent, "tracking": TrackingConfig(wandb=False)}
    if entry.variant == START:
        changes |= {"stages": (fine_tuning,), "text": None, "evaluation": base.evaluation.model_copy(update={"every": 0})}
        return base.model_copy(update=changes)
    stage = Stage(
        algorithm=method.algorithm,
        steps=LONG if entry.variant in LONG_RUNS else STEPS,
        batch_size=method.batch_size,
        optimiser=Optimiser(learning_rate=1e-3, warmup_steps=8),
    )
    student = Model(path=str(entry.start.folder / "student"))
    text = base.text if method.algorithm.text else None
    changes |= {"stages": (stage,), "student": student, "text": text, "checkpoint_every": MEASURE_EVERY}
    return base.model_copy(update=changes)
