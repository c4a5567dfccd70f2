"""Runs -> the tables and figures of docs/comparison.md. What stands between its markers is written anew, the rest by people."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from comparison import figures
from comparison.gaps import GAPS
from comparison.plan import HEADS, METHODS, Entry
from comparison.results import Outcome, read_outcome
from comparison.tables import Groups, Table, claims_table, cost_table, gaps_table, measures_table, time_table

DOCS = Path(__file__).parents[2] / "docs"


def write(entries: Sequence[Entry]) -> None:
    """Fill in docs/comparison.md and draw its figures beside it, from finished entries."""
    outcomes = [read_outcome(entry, entry.folder) for entry in entries if entry.variant != HEADS]
    watched = [json.loads((entry.folder / GAPS).read_text(encoding="utf-8")) for entry in entries if entry.variant == HEADS]
    sizes = dict.fromkeys(outcome.entry.size for outcome in outcomes if outcome.entry.variant in METHODS)
    tables, drawings = {"claims": claims_table(grouped(outcomes, "fifth"))}, {}
    if watched:
        tables["gaps"], drawings["gaps"] = gaps_table(watched), figures.gaps(watched)
    for size in sizes:
        groups = grouped(outcomes, size)
        methods = {name: groups[name] for name in METHODS if name in groups}
        tables |= {
            f"measures-{size}": measures_table(groups),
            f"cost-{size}": cost_table(groups, size),
            f"time-{size}": time_table(groups),
        }
        drawings |= {
            f"time-{size}": figures.reverse_kl_over_time(methods),
            f"trade-off-{size}": figures.trade_off(methods),
            f"exposure-{size}": figures.exposure(methods),
        }
    save(tables, drawings)


def save(tables: Mapping[str, Table], drawings: Mapping[str, str]) -> None:
    """The figures as files, the tables between the markers of the page."""
    (DOCS / "comparison").mkdir(parents=True, exist_ok=True)
    for name, svg in drawings.items():
        (DOCS / "comparison" / f"{name}.svg").write_text(svg, encoding="utf-8")
    page = DOCS / "comparison.md"
    page.write_text(filled_in(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def grouped(outcomes: Iterable[Outcome], size: str) -> Groups:
    """The outcomes of one size by variant."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.entry.size == size:
            groups.setdefault(outcome.entry.variant, []).append(outcome)
    return groups


def filled_in(page: str, tables: Mapping[str, Table]) -> str:
    """The page with every table between ``<!-- name -->`` and ``<!-- end -->``; raises ValueError where a marker is missing."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = markdown(table)
        page, count = pattern.subn(lambda match, text=text: f"{match[1]}{text}{match[2]}", page)
        if count != 1:
            raise ValueError(f"docs/comparison.md has {count} places for the table {name}, it needs '<!-- {name} -->' once")
    return page


def markdown(table: Table) -> str:
    """The first row is the head."""
    rows = ["| " + " | ".join(row) + " |\n" for row in table]
    return rows[0] + "|---" * len(table[0]) + "|\n" + "".join(rows[1:])
