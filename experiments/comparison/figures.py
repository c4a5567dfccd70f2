"""The figures of docs/comparison.md, by the report's charts, each a file of its own with its key and its colours."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from comparison.plan import METHODS
from comparison.results import Outcome
from raykd.report.charts import HEIGHT, WIDTH, Look, Point, curves

Groups = Mapping[str, Sequence[Outcome]]
LIGHT = (
    "--muted: #5c6370; --grid: #e3e6ea; --series-0: #0072b2; --series-1: #c44e00; --series-2: #00795a; --series-3: #a33f86; "
    "--series-4: #7a6400; --series-5: #5b4fc4;"
)
DARK = (
    "--muted: #a3abb8; --grid: #31353d; --series-0: #56b4e9; --series-1: #ff9455; --series-2: #3fcf9f; --series-3: #e79fd0; "
    "--series-4: #e0cb4f; --series-5: #a99cff;"
)
"""The report's colours."""
KEY_WIDTH, LINE = 150, 18


def reverse_kl_over_time(methods: Groups) -> str:
    """Held-out reverse KL over training time, mean over seeds."""
    return drawn(
        {name: _mean_curve(group, "seconds", "reverse_kl") for name, group in methods.items()}, "training seconds", "reverse KL"
    )


def trade_off(methods: Groups) -> str:
    """Where every method goes from the fine-tuned student, which is the common corner."""
    return drawn(
        {name: _mean_curve(group, "forward_kl", "reverse_kl") for name, group in methods.items()}, "forward KL", "reverse KL"
    )


def exposure(methods: Groups) -> str:
    """ExAccErr over the length, mean over seeds."""
    series = {
        name: [(length + 1, fmean(values)) for length, values in enumerate(zip(*(o.excess_error for o in group), strict=False))]
        for name, group in methods.items()
    }
    return drawn(series, "tokens", "ExAccErr, %", dots=False)


def gaps(watched: Sequence[Mapping[str, Any]]) -> str:
    """Head and tail gap from random weights, as parts of what they were."""
    series: dict[str, list[Point]] = {}
    for divergence in watched[0]["random"]:
        for part in ("head", "tail"):
            seeds = [seed["random"][divergence] for seed in watched]
            means = [(points[0]["step"], fmean(point[part] for point in points)) for points in zip(*seeds, strict=True)]
            series[f"{part}, {divergence}"] = [(step, value / means[0][1]) for step, value in means]
    return drawn(series, "optimiser steps", "part of the gap that is left")


def drawn(series: Mapping[str, Sequence[Point]], x: str, y: str, *, dots: bool = True) -> str:
    """The chart with its key on the right and its colours inside: a file that can stand alone."""
    known = list(METHODS)  # a method looks the same in every figure
    looks = {name: Look.of(known.index(name) if name in known else index) for index, name in enumerate(series)}
    chart = curves(series, looks, x=x, y=y, dots=dots, from_zero=False)
    inner = chart[chart.index(">", chart.index("<svg")) + 1 : chart.rindex("</svg>")]
    height = max(HEIGHT, LINE * len(series) + 10)
    keys = "".join(_key(name, looks[name], 10 + LINE * index) for index, name in enumerate(series))
    style = (
        f":root {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }} text {{ font-family: sans-serif; }}"
    )
    size = f'width="{WIDTH + KEY_WIDTH}" height="{height}" viewBox="0 0 {WIDTH + KEY_WIDTH} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{inner}{keys}</svg>\n'


def _key(name: str, look: Look, y: int) -> str:
    dash = f' stroke-dasharray="{" ".join(map(str, look.dash))}"' if look.dash else ""
    line = f'<line x1="{WIDTH + 8}" x2="{WIDTH + 32}" y1="{y}" y2="{y}" stroke-width="3" stroke="{look.colour}"{dash}/>'
    return f'{line}<text x="{WIDTH + 38}" y="{y + 4}" font-size="11" fill="var(--muted)">{escape(name)}</text>'


def _mean_curve(group: Sequence[Outcome], x: str, y: str) -> list[Point]:
    """Means over seeds, measurement by measurement."""
    return [
        (fmean(_of(point, x) for point in points), fmean(_of(point, y) for point in points))
        for points in zip(*(outcome.curve for outcome in group), strict=True)
    ]


def _of(point: Any, name: str) -> float:
    return point.values[name] if name in point.values else getattr(point, name)
