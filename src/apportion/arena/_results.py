"""Reading what the arena has found: finished cells, their numbers with intervals, and what intervals can tell apart."""

import ast
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.arena._learning import Curve
from apportion.arena._measures import Estimate
from apportion.arena._methods import BARS

Result = Mapping[str, Any]

BETTER = {"bias": -1, "rank": 1, "sign": 1, "auc": 1, "blame": 1, "cosine": 1, "aim": 1, "snr": 1}
"""Which way is better. Noise is not among them: a credit that is hardly related to the truth has little of it at its best
scale, so it says something beside bias only."""

BASE = "grpo"
"""What methods are compared with."""


@dataclass(frozen=True)
class Results:
    """The finished cells of a folder, as `load` gives them."""

    cells: Sequence[Result]

    @property
    def worlds(self) -> list[str]:
        """Worlds that were measured as they are."""
        return [c["name"] for c in self.measured if not c["turned"]]

    @property
    def measured(self) -> list[Result]:
        """Cells of measures."""
        return [c for c in self.cells if c["kind"] == "measures"]

    @property
    def claims(self) -> list[Result]:
        """Cells of claims."""
        return [c for c in self.cells if c["kind"] == "claims"]

    def cell(self, world: str, **turned: Any) -> Result | None:
        """The cell with exactly these knobs turned; None = not run."""
        found = (c for c in self.measured if c["name"] == world and c["turned"] == turned)
        return next(found, None)

    def along(self, world: str, knob: str) -> dict[Any, Result]:
        """The world's cells in which nothing but `knob` was turned, by its value, the untouched world included."""
        cells = [c for c in self.measured if c["name"] == world and set(c["turned"]) <= {knob}]
        by_value = {setting(c, knob): c for c in cells}
        return {value: by_value[value] for value in sorted(by_value)} if len(by_value) > 1 else {}

    def curves(self, world: str) -> dict[str, dict[int, Curve]]:
        """Learning curves by method and seed."""
        found: dict[str, dict[int, Curve]] = {}
        for c in self.cells:
            if c["kind"] == "learning" and c["name"] == world and "curve" in c:
                found.setdefault(c["method"], {})[c["seed"]] = Curve.from_json(c["curve"])
        return found

    def level(self, world: str) -> float:
        """The accuracy that was to be reached there."""
        return next(float(c["level"]) for c in self.cells if c["kind"] == "learning" and c["name"] == world)

    @property
    def learned(self) -> list[str]:
        """Worlds in which something was trained."""
        return list(dict.fromkeys(c["name"] for c in self.cells if c["kind"] == "learning" and "curve" in c))


def setting(cell: Result, knob: str) -> Any:
    """The value a knob has in a cell, turned or not; None where the world has no such knob."""
    if knob == "size":
        return cell["size"]
    call = ast.parse(cell["world"], mode="eval").body
    assert isinstance(call, ast.Call)
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == knob), None)


def label(cell: Result) -> str:
    """`trees/verdict_error=0.4`, as its file is named."""
    return f"{cell['name']}/{','.join(f'{k}={v}' for k, v in cell['turned'].items()) or 'base'}"


def methods(cell: Result, *, bars: bool = False) -> list[str]:
    """The methods that a cell could measure."""
    return [n for n, row in cell["methods"].items() if "absent" not in row and (bars or n not in BARS)]


def estimate(cell: Result, method: str, measure: str) -> Estimate:
    """A number of a cell with its interval; NaN where there is none."""
    return _read(cell["methods"][method]["measures"][measure])


def over_base(cell: Result, method: str) -> Estimate | None:
    """How much larger the cosine is than GRPO's, with its paired interval; None where GRPO does not run."""
    found = cell["methods"][method].get("over_grpo")
    return None if found is None else _read(found)


def _read(found: Sequence[Any]) -> Estimate:
    return Estimate(*(math.nan if x is None else float(x) for x in found))


def minus(a: Estimate, b: Estimate) -> Estimate:
    """Of two independent estimates; too wide for two credits of the same episodes, which agree in part.

    Each side of the interval adds up the squared distances that the two intervals reach to (Zou and Donner, 2008).

    Example:
        >>> minus(Estimate(0.5, 0.125, 0.875), Estimate(0.0, -0.5, 0.5))
        Estimate(value=0.5, low=-0.125, high=1.125)
    """
    value = a.value - b.value
    low, high = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, value - low, value + high)


def ranked(cell: Result, measure: str, among: Collection[str] | None = None) -> list[str]:
    """Methods from best to worst, bars left out; what cannot be measured is left out too."""
    names = [n for n in methods(cell) if among is None or n in among]
    found = {n: BETTER[measure] * estimate(cell, n, measure).value for n in names}
    return sorted((n for n in names if not math.isnan(found[n])), key=lambda n: (-found[n], _spent(cell, n), n))


def tied(cell: Result, measure: str, best: str) -> list[str]:
    """Methods that cannot be told apart from `best`: the interval of the difference holds 0.

    Cosines are compared by what they have beyond GRPO's, from which the luck of the episodes is gone.
    """

    def standing(method: str) -> Estimate:
        over = over_base(cell, method) if measure == "cosine" else None
        return estimate(cell, method, measure) if over is None else over

    top = standing(best)
    return [n for n in ranked(cell, measure) if n != best and holds(minus(top, standing(n)), 0.0)]


def holds(interval: Estimate, value: float) -> bool:
    """Does the interval hold the value?"""
    return interval.low <= value <= interval.high


def _spent(cell: Result, method: str) -> float:
    return float(sum(cell["methods"][method]["cost"].values()))


def joined(rows: Sequence[tuple[str, Sequence[str]]], join: Callable[[list[str]], str]) -> list[list[str]]:
    """Rows of a table; methods whose printed numbers are the same share one."""
    by_text: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows:
        by_text.setdefault(tuple(cells), []).append(name)
    return [[join(names), *cells] for cells, names in by_text.items()]
