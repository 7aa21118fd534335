"""`apportion methods`"""

import inspect
import re
from typing import Any

from apportion import credit, losses, signals
from apportion.cli._app import call, console, print_json
from apportion.cli._compose import bound, dialects_of, exported, kind_of


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(methods, argv)


def methods(*, json: bool = False) -> int:
    """List the credit methods: what each needs, what it must see at once, what it costs, and where it comes from.

    Then the losses and signals that come from a paper too, for use in Python. Any other name is a value of --credit; so is a composition such as "chain(grpo(), clip(limit=2.0))", and your own
    module:function. Names that begin with a dot are dialects: group_relative.verl() gives verl's own numbers.

    Examples:
      apportion methods
      apportion methods --json

    Args:
        json: print JSON.
    """
    rows = [_row(name) for name in exported()]
    rows.sort(key=lambda row: (["estimator", "transform", "combinator"].index(row["kind"]), row["name"]))
    rows += _others("loss", losses) + _others("signal", signals)
    if json:
        print_json(rows)
    else:
        _print_table(rows)
    return 0


def _row(name: str) -> dict[str, Any]:
    function = getattr(credit, name)
    made = None if kind_of(name) == "combinator" else bound(function)
    row = _told(name, kind_of(name), function, made.requires if made else ())
    if made:
        row |= {"scope": made.scope, "group_of": made.needs_group_of, "expression": repr(made)}
    return row | {"dialects": sorted(dialects_of(function))}


def _others(kind: str, room: Any) -> list[dict[str, Any]]:
    """What a room exports with a source of its own."""
    short = room.__name__.rpartition(".")[2]
    found = {name: getattr(room, name) for name in room.__all__}
    sourced = {name: x for name, x in found.items() if "Source:" in (inspect.getdoc(x) or "")}
    return [_told(f"{short}.{name}", kind, x, getattr(x, "requires", ())) for name, x in sourced.items()]


def _told(name: str, kind: str, found: Any, needs: Any) -> dict[str, Any]:
    """A row with what the docstring says; `needs` is a tuple, or a property of a class that depends on settings."""
    doc = inspect.getdoc(found) or ""
    return {
        "name": name,
        "kind": kind,
        "needs": list(needs) if isinstance(needs, tuple) else [],
        "scope": None,
        "group_of": None,
        "about": doc.partition("\n")[0],
        "cost": _field(doc, "Cost"),
        "source": _field(doc, "Source"),
        "dialects": [],
        "expression": None,
    }


def _field(doc: str, name: str) -> str | None:
    """The first clause of a field of the docstring, such as "Source:"."""
    found = re.search(rf"{name}: (.*?)(?:\.\s|\.$|;|\n\s*\n|$)", doc, re.DOTALL)
    return " ".join(found[1].split()) if found else None


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("name", "kind", "needs", "scope", "cost", "source"):
        table.add_column(column, no_wrap=column in ("name", "kind", "scope"), overflow="fold")
    for row in rows:
        name = "\n  .".join([row["name"], *row["dialects"]])
        needs, source = ", ".join(row["needs"]), row["source"] or row["about"]
        cells = (name, row["kind"], needs, row["scope"] or "", row["cost"] or "", source)
        table.add_row(*(Text(cell) for cell in cells))
    console().print(table)
