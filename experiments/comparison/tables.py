"""Outcomes -> the tables of docs/comparison.md."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from comparison.findings import PUBLISHED, SYSTEM, Claim, threshold, verdict
from comparison.pairs import PAIRS, START, TEACHER
from comparison.plan import METHODS
from comparison.results import Outcome, Spread, noise, over_seeds

COLUMNS: Mapping[str, tuple[str, int]] = {
    "test_loss": ("cross-entropy", 3),
    "forward_kl": ("forward KL", 3),
    "reverse_kl": ("reverse KL", 3),
    "rouge_l": ("Rouge-L to the reference", 2),
    "rouge_l_to_teacher": ("Rouge-L to the teacher", 2),
    "excess_error": ("ExAccErr, %", 1),
    "distinct_4": ("distinct-4, %", 1),
    "self_bleu": ("self-BLEU", 2),
}
"""A measure's title and digits."""
DIGITS = {name: digits for name, (_, digits) in COLUMNS.items()} | {"gradient_spread": 3, "seconds": 1}
NAMES = {TEACHER: "(teacher)", START: "(fine-tuned student)"}
Table = list[list[str]]
Groups = Mapping[str, Sequence[Outcome]]
"""By variant, one outcome for each seed."""


def measures_table(groups: Groups) -> Table:
    """Every method after equal steps; mean and standard deviation over seeds."""
    rows = [
        [NAMES.get(name, name), str(len(groups[name]))]
        + [measured(groups[name], measure).text(digits) for measure, (_, digits) in COLUMNS.items()]
        for name in (*NAMES, *METHODS)
        if name in groups
    ]
    if any(len(group) > 1 for name, group in groups.items() if name not in NAMES):
        rows.append(["noise", "", *(f"{noise_of(measure, groups):.{digits}f}" for measure, (_, digits) in COLUMNS.items())])
    return [["method", "seeds", *(title for title, _ in COLUMNS.values())], *rows]


def cost_table(groups: Groups, pair: str) -> Table:
    """What the steps cost, and what a given reverse KL costs."""
    level, system = PAIRS[pair].level, SYSTEM.get(pair, {})
    rows = [
        [
            name,
            seconds_of(groups[name]).text(1),
            over_seeds(groups[name], lambda outcome: relative(outcome, groups.get("kd", ()))).text(2),
            *([f"{system[name]:.2f}"] if system else []),
            PUBLISHED.get(name, ""),
            *_reached(groups[name], level),
        ]
        for name in METHODS
        if name in groups
    ]
    head = ["method", "seconds", "relative to KD", *(["by Ray and vLLM"] if system else []), "published"]
    return [[*head, f"reverse KL {level} after seconds", "after tokens, thousands"], *rows]


def _reached(group: Sequence[Outcome], level: float) -> list[str]:
    """Seconds and thousands of tokens."""
    found = {outcome.entry.seed: reached for outcome in group if (reached := outcome.reaches("reverse_kl", level))}
    spreads = [Spread({seed: pair[index] / scale for seed, pair in found.items()}) for index, scale in ((0, 1), (1, 1e3))]
    return [spread.text(0) + _count(spread, group) for spread in spreads]


def _count(spread: Spread, group: Sequence[Outcome]) -> str:
    """In how many runs a number was found, where not in all or none."""
    return f" ({len(spread.values)} of {len(group)})" if 0 < len(spread.values) < len(group) else ""


def time_table(groups: Groups) -> Table:
    """The held-out numbers after equal training time: that of the steps of KD, and that of the steps of GKD."""
    times = [seconds_of(groups[name]).mean for name in ("kd", "gkd") if name in groups]
    cells = [(seconds, measure) for seconds in times for measure in ("forward_kl", "reverse_kl")]
    rows = []
    for name in METHODS:
        longest = {outcome.entry.seed: outcome for variant in (name, f"{name}_long") for outcome in groups.get(variant, ())}
        if runs := list(longest.values()):
            found = [over_seeds(runs, lambda run, cell=cell: run.at_seconds(*cell)) for cell in cells]
            rows.append([name, *(spread.text(3) + _count(spread, runs) for spread in found)])
    return [["method", *(f"{COLUMNS[measure][0]} after {seconds:.0f} s" for seconds, measure in cells)], *rows]


def seconds_of(group: Sequence[Outcome]) -> Spread:
    """Of training."""
    return over_seeds(group, lambda outcome: outcome.seconds)


def relative(outcome: Outcome, references: Sequence[Outcome]) -> float | None:
    """Training time beside the reference run of the same seed; None where there is none."""
    same_seed = [reference for reference in references if reference.entry.seed == outcome.entry.seed]
    return outcome.seconds / same_seed[0].seconds if same_seed else None


def claims_table(groups: Groups, claims: Sequence[Claim]) -> Table:
    """Every claim with its numbers and what follows."""
    head = ["paper", "claim", "first", "second", "seeds", "difference", "counts from", "here"]
    return [head, *(_claim_row(claim, groups) for claim in claims)]


def _claim_row(claim: Claim, groups: Groups) -> list[str]:
    better, worse = (measured(groups.get(name, ()), claim.measure) for name in (claim.better, claim.worse))
    difference, spread = better.minus(worse), noise_of(claim.measure, groups)
    digits = DIGITS[claim.measure]
    title = COLUMNS.get(claim.measure, (claim.measure.replace("_", " "), 0))[0]
    found = [""] * 5
    if difference.values:
        sides = [f"{Spread({s: side.by_seed[s] for s in difference.by_seed}).mean:.{digits}f}" for side in (better, worse)]
        counts = [f"{difference.mean:+.{digits}f}", f"{threshold(difference, spread):.{digits}f}"]
        found = [*sides, str(len(difference.values)), *counts]
    said = f"{title}: `{claim.better}` {'above' if claim.higher else 'below'} `{claim.worse}`"
    return [claim.paper, said, *found, verdict(claim, difference, spread).value]


def noise_of(measure: str, groups: Groups) -> float:
    """Between students of the same kind and different seeds, each taken relative to the fine-tuned student of its seed."""
    start = measured(groups[START], measure)
    return noise([measured(group, measure).minus(start) for name, group in groups.items() if name not in NAMES])


def measured(group: Sequence[Outcome], measure: str) -> Spread:
    """A measure of the final student, its seconds of training, or how unsteady the gradient's norm was: its standard deviation
    over its mean."""
    if measure == "seconds":
        return seconds_of(group)
    if measure == "gradient_spread":
        return over_seeds(group, lambda outcome: pstdev(outcome.gradient_norms) / fmean(outcome.gradient_norms))
    return over_seeds(group, lambda outcome: outcome.measures.get(measure))  # a teacher is compared with nobody


def gaps_table(watched: Sequence[Mapping[str, Any]]) -> Table:
    """Head and tail gap after some steps, as parts of what they were at the beginning; mean over seeds."""
    rows: Table = [["from", "divergence", "gap", *(f"step {point['step']}" for point in watched[0]["random"]["forward_kl"])]]
    for start, divergences in watched[0].items():
        for divergence in divergences:
            for part in ("head", "tail"):
                curves = [[point[part] for point in seed[start][divergence]] for seed in watched]
                means = [fmean(values) for values in zip(*curves, strict=True)]
                rows.append([start, divergence, part, f"{means[0]:.3f}", *(f"{value / means[0]:.3f}" for value in means[1:])])
    return rows
