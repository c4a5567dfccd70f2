"""Runs -> the tables and figures of docs/comparison.md. What stands between its markers is written anew, the rest by people."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from comparison import figures
from comparison.findings import CLAIMS
from comparison.gaps import GAPS
from comparison.pairs import TEACHER_TEXT, TEXT
from comparison.plan import HEADS, METHODS, Entry
from comparison.results import Outcome, read_outcome
from comparison.tables import Groups, Table, claims_table, cost_table, gaps_table, measures_table, time_table

DOCS = Path(__file__).parents[2] / "docs"


def write(entries: Sequence[Entry]) -> None:
    """Fill in docs/comparison.md and draw its figures beside it, from finished entries."""
    outcomes = [read_outcome(entry, entry.folder) for entry in entries if entry.variant not in (HEADS, TEACHER_TEXT, TEXT)]
    watched = [json.loads((entry.folder / GAPS).read_text(encoding="utf-8")) for entry in entries if entry.variant == HEADS]
    tables: dict[str, Table] = {}
    drawings: dict[str, str] = {}
    if watched:
        tables["gaps"], drawings["gaps"] = gaps_table(watched), figures.gaps(watched)
    for pair in dict.fromkeys(outcome.entry.pair for outcome in outcomes if outcome.entry.variant in METHODS):
        groups = grouped(outcomes, pair)
        methods = {name: groups[name] for name in METHODS if name in groups}
        tables |= {
            f"measures-{pair}": measures_table(groups),
            f"cost-{pair}": cost_table(groups, pair),
            f"time-{pair}": time_table(groups),
        }
        if pair in CLAIMS and any(len(group) > 1 for group in methods.values()):  # else nobody knows the noise
            tables[f"claims-{pair}"] = claims_table(groups, CLAIMS[pair])
        drawings |= {
            f"time-{pair}": figures.reverse_kl_over_time(methods),
            f"trade-off-{pair}": figures.trade_off(methods),
            f"exposure-{pair}": figures.exposure(methods),
        }
    save(tables, drawings)


def save(tables: Mapping[str, Table], drawings: Mapping[str, str]) -> None:
    """The figures as files, the tables between the markers of the page."""
    (DOCS / "comparison").mkdir(parents=True, exist_ok=True)
    for name, svg in drawings.items():
        (DOCS / "comparison" / f"{name}.svg").write_text(svg, encoding="utf-8")
    page = DOCS / "comparison.md"
    page.write_text(filled_in(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def grouped(outcomes: Iterable[Outcome], pair: str) -> Groups:
    """The outcomes of one pair by variant."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.entry.pair == pair:
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
