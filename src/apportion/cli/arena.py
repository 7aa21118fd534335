"""`apportion arena run|table|plot|report`"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from apportion.cli._app import OptionalNumber, OptionalPath, OptionalText, call, console, print_json
from apportion.cli._compose import imported, parse_credit
from apportion.cli._errors import UserError, nearest

if TYPE_CHECKING:
    from apportion.arena._cells import Cell
    from apportion.arena._results import Result, Results
    from apportion.credit import Estimator

_HELP = """usage: apportion arena run|table|plot|report [options]

Measure how right every credit method is, in worlds whose exact advantages are known (docs/arena.md).

  run     measure methods, train with them, check claims of papers; goes on where it was stopped
  table   methods and their measures, with intervals
  plot    pictures, as PNG and SVG
  report  the whole page of results, in Markdown

Examples:
  apportion arena run --quick
  apportion arena run --methods grpo "chain(grpo(), clip(limit=2.0))" mine:method --worlds trees
  apportion arena table --world trees --measure cosine bias
  apportion arena report

apportion arena run --help explains one of them."""

_FOLDER = Path("arena-results")
_SHOWN = ("cosine", "bias", "noise", "rank", "auc")
_Folder = Annotated[Path, tyro.conf.Positional]


def main(argv: list[str]) -> int:
    """Find the subcommand and run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP)
        return 0 if argv else 2
    if argv[0] not in _COMMANDS:
        raise UserError(f"arena has no subcommand {argv[0]!r}. {nearest(argv[0], _COMMANDS)}")
    return call(_COMMANDS[argv[0]], argv[1:], name=f"arena {argv[0]}")


# ---- run --------------------------------------------------------------------------------------------------------------


def run(
    *,
    quick: bool = False,
    full: bool = False,
    learning: bool = False,
    claims: bool = False,
    methods: tuple[str, ...] = (),
    worlds: tuple[str, ...] = (),
    out: Path = _FOLDER,
    workers: OptionalNumber = None,
    json: bool = False,
) -> int:
    """Run cells, each one file of results. What is finished is not repeated, so a stopped run is simply started again.

    Several kinds may be asked for at once; without any it is --quick.

    Examples:
      apportion arena run --quick
      apportion arena run --full --claims
      apportion arena run --learning --worlds rooms --methods grpo gigpo
      apportion arena run --methods grpo capo "chain(grpo(), clip(limit=2.0))" mine:method --worlds trees rooms

    Args:
        quick: every world, and its most telling changes: minutes.
        full: every world with every knob turned: an hour or two.
        learning: train with methods from the same start, several seeds: hours, in cells of minutes.
        claims: hold claims of papers against worlds; short forms of them with --quick.
        methods: names, compositions or your own module:function; all if none is given. The two bars are always there.
        worlds: names of worlds, or your own module:World; all of ours if none is given.
        out: the folder of results.
        workers: processes; one per core if not given.
        json: print what was done as JSON.
    """
    from apportion.arena._cells import run as run_cells
    from apportion.arena._cells import unfinished

    kinds = {"full": full, "quick": quick, "learning": learning, "claims": claims}
    cells = _cells([k for k, asked in kinds.items() if asked] or ["quick"], _checked(methods), _known(worlds))
    left = unfinished(out, cells)
    with _progress(len(cells), len(cells) - len(left)) as finished:
        computed = run_cells(out, left, workers=workers, on_cell=finished)
    if json:
        print_json({"folder": str(out), "cells": len(cells), "computed": computed})
    else:
        print(f"{out}: {computed} cells computed, {len(cells) - computed} were there already.")
        where = "" if out == _FOLDER else f" {out}"
        print(f"Next: apportion arena table{where}, apportion arena plot{where}, apportion arena report{where}")
    return 0


def _cells(kinds: Sequence[str], methods: Sequence[str], worlds: Sequence[str]) -> "list[Cell]":
    from apportion.arena import _grid

    quick, ours = "full" not in kinds, [name for name in worlds if ":" not in name]
    cells: list[Cell] = []
    if "full" in kinds or "quick" in kinds:
        if ours or not worlds:
            cells += _grid.measured(quick=quick, methods=methods or None, only=ours or None, resolve=resolve)
        cells += [_own_world(name, methods) for name in worlds if ":" in name]
    if "learning" in kinds:
        able = [name for name in ours if name in _grid.classrooms()]
        if worlds and not able:
            raise UserError(f"nothing is learned in {', '.join(worlds)}. There is: {', '.join(_grid.classrooms())}.")
        cells += _grid.trained(methods=methods or None, only=able or None, resolve=resolve)
    if "claims" in kinds:
        cells += _grid.claimed(quick="quick" in kinds)
    return cells


def _own_world(text: str, methods: Sequence[str]) -> "Cell":
    """The cell of the user's `module:World`, as it is."""
    from apportion.arena import World
    from apportion.arena._grid import Measured
    from apportion.arena._methods import BARS, every_method

    module, _, name = text.partition(":")
    try:
        world = imported(module, name)()
    except UserError as error:
        raise UserError(str(error).replace("--credit", "--worlds")) from error
    if not isinstance(world, World):
        raise UserError(f"--worlds {text} is not a world: it has no method episodes(groups, size, seed).")
    return Measured(name.lower(), world, (), tuple(dict.fromkeys([*BARS, *(methods or every_method())])), resolve)


def resolve(text: str) -> "Estimator":
    """As `parse_credit`, for `--methods`."""
    try:
        return parse_credit(text)
    except UserError as error:
        raise UserError(str(error).replace("--credit", "--methods")) from error


def _checked(methods: Sequence[str]) -> Sequence[str]:
    """The methods, if all are understood: a typing mistake should not be found after an hour."""
    from apportion.arena._methods import every_method

    for text in methods:
        if text not in every_method():
            resolve(text)
    return methods


def _known(worlds: Sequence[str]) -> Sequence[str]:
    from apportion.arena._grid import worlds as all_worlds

    for name in worlds:
        if ":" not in name and name not in all_worlds():
            raise UserError(f"there is no world {name!r}. {nearest(name, all_worlds())}")
    return worlds


@contextmanager
def _progress(total: int, done: int) -> "Iterator[Callable[[Cell], None]]":
    """A bar on a terminal, else a line per cell; yields what is to be called with every finished cell."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    told = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=told, transient=True, disable=not told.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def finished(cell: "Cell") -> None:
            bar.update(task, advance=1, description=cell.path)
            if not told.is_terminal:
                print(cell.path, file=sys.stderr, flush=True)

        yield finished


# ---- reading ------------------------------------------------------------------------------------------------------------


def table(
    folder: _Folder = _FOLDER, /, *, world: OptionalText = None, measure: tuple[str, ...] = (), json: bool = False
) -> int:
    """Print methods and their measures with 95 % intervals, sorted by the first measure.

    Examples:
      apportion arena table
      apportion arena table --world trees --measure auc blame
      apportion arena table --world trees/verdict_error=0.4 --json

    Args:
        folder: of results.
        world: a world, or one of its cells (trees/verdict_error=0.4); every world as it is, if none is given.
        measure: names of measures.
        json: print JSON.
    """
    from apportion.arena._measures import MEASURES
    from apportion.arena._results import label

    for name in measure:
        if name not in MEASURES:
            raise UserError(f"there is no measure {name!r}. {nearest(name, MEASURES)}")
    chosen, shown = _chosen(_results(folder), world), measure or _SHOWN
    if json:
        print_json([_as_json(cell, shown) for cell in chosen])
        return 0
    out = console()
    for cell in chosen:
        out.print(f"\n[bold]{label(cell)}[/bold]: {cell['groups']} groups of {cell['size']} rollouts, {cell['world']}")
        out.print(_rich_table(cell, shown))
        absent = [n for n, row in cell["methods"].items() if "absent" in row]
        if absent:
            out.print(f"not here, for want of a signal: {', '.join(absent)}")
    out.print("")
    for name in shown:
        out.print(f"{name}: {MEASURES[name]}")
    return 0


def _chosen(results: "Results", world: str | None) -> "list[Result]":
    from apportion.arena._results import label

    if world is None:
        return [c for c in results.measured if not c["turned"]]
    by_label = {label(c): c for c in results.measured}
    by_label |= {c["name"]: c for c in results.measured if not c["turned"]}
    if world not in by_label:
        raise UserError(f"nothing was measured in {world!r}. {nearest(world, by_label)}")
    return [by_label[world]]


def _as_json(cell: "Result", shown: Sequence[str]) -> dict[str, Any]:
    from apportion.arena._results import estimate

    rows = [
        {"method": n, **{m: vars(estimate(cell, n, m)) for m in shown}, "cost": cell["methods"][n]["cost"]}
        for n in _sorted(cell, shown[0])
    ]
    absent = {n: row["absent"] for n, row in cell["methods"].items() if "absent" in row}
    return {k: v for k, v in cell.items() if k not in ("methods", "kind")} | {"methods": rows, "absent": absent}


def _rich_table(cell: "Result", shown: Sequence[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from apportion.arena._methods import BARS
    from apportion.arena._report import cost_of, number
    from apportion.arena._results import estimate

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("method", overflow="fold", min_width=28)
    for name in (*shown, "cost"):
        made.add_column(name, justify="right")
    for n in _sorted(cell, shown[0]):
        cells = (n, *(number(estimate(cell, n, m)) for m in shown), cost_of(cell, n))
        made.add_row(*(Text(x) for x in cells), style="dim" if n in BARS else None)
    return made


def _sorted(cell: "Result", measure: str) -> list[str]:
    """Best first; what could not be measured last."""
    from apportion.arena._results import BETTER, estimate, methods

    def place(name: str) -> float:
        value = estimate(cell, name, measure).value
        return math.inf if math.isnan(value) else -BETTER.get(measure, -1) * value

    return sorted(methods(cell, bars=True), key=place)


def plot(folder: _Folder = _FOLDER, /, *, out: OptionalPath = None, json: bool = False) -> int:
    """Draw who is right, what that depends on, and how methods learn: PNG and SVG.

    Examples:
      apportion arena plot
      apportion arena plot arena-results --out pictures

    Args:
        folder: of results.
        out: a folder for the pictures; figures in the folder of results, if not given.
        json: print the paths as JSON.
    """
    from apportion.arena._figures import draw

    where = out or folder / "figures"
    paths = [where / name for name in draw(_results(folder), where)]
    if json:
        print_json([str(path) for path in paths])
    else:
        print("\n".join(f"{path} (and .svg)" for path in paths))
    return 0


def report(folder: _Folder = _FOLDER, /, *, page: Path = Path("docs/results/arena.md"), json: bool = False) -> int:
    """Write the page of results, with its pictures in a folder of the same name beside it.

    Examples:
      apportion arena report
      apportion arena report docs/results/arena --page docs/results/arena.md

    Args:
        folder: of results.
        page: the Markdown file.
        json: print the paths as JSON.
    """
    from apportion.arena._figures import draw
    from apportion.arena._report import report as text_of

    results, pictures = _results(folder), page.with_suffix("")
    drawn = {f"{pictures.name}/{name}": title for name, title in draw(results, pictures).items()}
    page.write_text(text_of(results, drawn))
    if json:
        print_json({"page": str(page), "figures": [str(page.parent / name) for name in drawn]})
    else:
        print(f"{page}, pictures in {pictures}")
    return 0


def _results(folder: Path) -> "Results":
    from apportion.arena._cells import load
    from apportion.arena._results import Results

    found = load(folder)
    if not found:
        raise UserError(f"there are no results in {folder}. Run: apportion arena run --quick --out {folder}")
    return Results(found)


_COMMANDS: dict[str, Callable[..., int]] = {"run": run, "table": table, "plot": plot, "report": report}
