"""Numbers -> SVG, through Vega-Lite. Colours are the page's CSS variables, so that a chart follows light, dark and print."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import vl_convert

WIDTH, HEIGHT = 360, 210
NUM_POINTS, NUM_BARS = 90, 30
"""Most points of a curve and bars of a stack; longer runs are averaged over so many equal spans of steps."""
NUM_COLOURS = 6
DASHES = ((), (6, 3), (2, 2))
WIDE = 20.0
"""Largest over smallest value from which on a logarithmic axis shows more."""

Point = tuple[float, float]
Spec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """How one run, model or stage is drawn everywhere."""

    colour: str
    dash: tuple[int, ...]

    @classmethod
    def of(cls, index: int) -> "Look":
        """As different as can be: first the colours, then the dashes."""
        return cls(f"var(--series-{index % NUM_COLOURS})", DASHES[index // NUM_COLOURS % len(DASHES)])


def curves(
    series: Mapping[str, Sequence[Point]],
    looks: Mapping[str, Look],
    *,
    x: str,
    y: str,
    boundaries: Sequence[float] = (),
    may_be_log: bool = False,
    dots: bool = False,
    from_zero: bool = True,
) -> str:
    """A line for each of ``series``; ``dots`` marks every point, else many points become means with a band of their range."""
    rows = [
        {"name": name, **span}
        for name, points in series.items()
        for span in (_apart(points) if dots else averaged(points, NUM_POINTS))
    ]
    values = [row["y"] for row in rows]
    log = may_be_log and min(values) > 0 and max(values) / min(values) > WIDE
    first, last = min(row["x"] for row in rows), max(row["x"] for row in rows)
    x_axis: Spec = {"field": "x", "type": "quantitative", "title": x, "scale": {"nice": False, "zero": False}}
    y_axis: Spec = {"field": "y", "type": "quantitative", "title": f"{y}, log scale" if log else y}
    y_axis["scale"] = {"type": "log", "nice": False} if log else {"zero": from_zero and min(values) >= 0}
    y_axis["axis"] = {"format": "~e"} if max(map(abs, values)) < 1e-3 else {}
    layers: list[Spec] = [
        {"mark": {"type": "area", "opacity": 0.16}, "encoding": {"y": {**y_axis, "field": "low"}, "y2": {"field": "high"}}},
        {"mark": {"type": "line", "strokeWidth": 1.75, "strokeJoin": "round"}, "encoding": {"y": y_axis}},
    ]
    if dots:
        point = {"size": 26, "filled": True}
        path = {"y": y_axis, "order": {"field": "place"}}  # a line through the points as they come, not as x grows
        layers = [{"mark": {**layers[1]["mark"], "point": point}, "encoding": path}]
    names = list(series)
    styles = {
        "x": x_axis,
        "color": _scaled([looks[name].colour for name in names], names),
        "strokeDash": _scaled([list(looks[name].dash) for name in names], names),
    }
    return _svg(
        {
            "layer": [
                _rules([b for b in boundaries if first < b < last]),
                {"data": {"values": rows}, "encoding": styles, "layer": layers},
            ]
        }
    )


def stacked(parts: Mapping[str, Sequence[Point]], looks: Mapping[str, Look], *, x: str, y: str) -> str:
    """Every step's parts on top of each other; many steps become the means of equal spans."""
    steps = sorted({step for points in parts.values() for step, _ in points})
    rows: list[dict[str, Any]] = []
    below = [0.0] * len(steps)
    for name, points in parts.items():
        given = dict(points)
        spans = averaged([(step, given.get(step, 0.0)) for step in steps], NUM_BARS)
        for index, span in enumerate(spans):
            ends = {"left": span["first"] - 0.5, "right": span["last"] + 0.5}
            rows.append({"name": name, **ends, "low": below[index], "high": below[index] + span["y"]})
            below[index] += span["y"]
    encoding = {
        "x": {"field": "left", "type": "quantitative", "title": x, "scale": {"nice": False, "zero": False}},
        "x2": {"field": "right"},
        "y": {"field": "low", "type": "quantitative", "title": y},
        "y2": {"field": "high"},
        "color": _scaled([looks[name].colour for name in parts], list(parts)),
    }
    return _svg({"data": {"values": rows}, "mark": {"type": "rect"}, "encoding": encoding})


def averaged(points: Sequence[Point], num_spans: int) -> list[dict[str, float]]:
    """The mean of y over at most ``num_spans`` equal spans of the points, with its range: x, y, low, high, first and last x."""
    size = math.ceil(len(points) / num_spans)
    spans = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [_span([x for x, _ in span], [y for _, y in span]) for span in spans]


def _span(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    return {
        "x": sum(xs) / len(xs),
        "y": sum(ys) / len(ys),
        "low": min(ys),
        "high": max(ys),
        "first": xs[0],
        "last": xs[-1],
    }


def _apart(points: Sequence[Point]) -> list[dict[str, float]]:
    return [{"x": x, "y": y, "place": place} for place, (x, y) in enumerate(points)]


def _scaled(values: Sequence[Any], names: Sequence[str]) -> Spec:
    return {"field": "name", "type": "nominal", "scale": {"domain": list(names), "range": list(values)}, "legend": None}


def _rules(boundaries: Sequence[float]) -> Spec:
    return {
        "data": {"values": [{"x": x} for x in boundaries]},
        "mark": {"type": "rule", "strokeDash": [1, 3], "stroke": "var(--muted)"},
        "encoding": {"x": {"field": "x", "type": "quantitative"}},
    }


def _svg(spec: Spec) -> str:
    axis = {
        "domain": False,
        "gridColor": "var(--grid)",
        "labelColor": "var(--muted)",
        "labelFontSize": 11,
        "labelOverlap": "greedy",
        "tickCount": 5,
        "ticks": False,
        "titleColor": "var(--muted)",
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    config = {
        "background": None,
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False, "domain": True, "domainColor": "var(--muted)"},
        "axisY": {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -6},
    }
    size = {"width": WIDTH, "height": HEIGHT, "padding": 2, "autosize": {"type": "fit", "contains": "padding"}}
    return vl_convert.vegalite_to_svg({**spec, **size, "config": config})
