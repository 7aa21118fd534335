"""Pictures of what the arena has found: who is right, what that depends on, and what comes of it in learning."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apportion.arena._learning import mean_interval
from apportion.arena._measures import Estimate
from apportion.arena._methods import BARS
from apportion.arena._report import KNOBS
from apportion.arena._results import BASE, Results, estimate, methods, ranked

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # safe for the colour-blind
MARKERS = "osD^vP*"
_GREY = "#999999"
_PANELS = (("size",), ("verdict_error",), ("length", "terms"))
"""Knobs of the sensitivity figure, from left to right; of several in one place the one that a world has."""
_LINES = 5  # methods drawn in colour, next to GRPO and the exact advantage


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Write every picture there is something for, as PNG and SVG; titles by the name of the PNG."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, title, maker in _FIGURES:
        with rc_context(
            {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
        ):
            figure = maker(results)
            if figure is None:
                continue
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        drawn[f"{name}.png"] = title
    return drawn


def _leaderboard(results: Results) -> Any:
    """The cosine of every method, a column for each world; methods that agree everywhere share a row."""
    cells = [cell for name in results.worlds if (cell := results.cell(name))]
    if not cells:
        return None
    by_numbers: dict[tuple[Any, ...], list[str]] = {}
    for n in dict.fromkeys(n for cell in cells for n in methods(cell, bars=True)):
        found = tuple(estimate(c, n, "cosine") if n in methods(c, bars=True) else None for c in cells)
        by_numbers.setdefault(tuple(e and tuple(round(x, 2) for x in vars(e).values()) for e in found), []).append(n)
    rows = sorted(by_numbers.items(), key=lambda row: _mean([e[0] for e in row[0] if e]))
    figure = _figure(len(cells), width=2.3, height=1.2 + 0.19 * len(rows), left=2.6)
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, cell, i in zip(panels, cells, range(len(cells)), strict=True):
        for y, (numbers, names) in enumerate(rows):
            if numbers[i]:
                _point(axes, y, numbers[i], _colour_of(names))
        axes.axvline(0, color=_GREY, linewidth=0.8)
        axes.set(title=cell["name"], xlabel="cosine with the exact gradient")
    panels[0].set_yticks(range(len(rows)), [_short(names) for _, names in rows], fontsize=7)
    panels[0].set_ylim(-0.7, len(rows) - 0.3)
    return figure


def _point(axes: Any, y: int, number: Sequence[float], colour: str) -> None:
    value, low, high = number
    axes.plot([low, high], [y, y], color=colour, linewidth=1.2)
    axes.plot([value], [y], "o", color=colour, markersize=3.5)


def _colour_of(names: Sequence[str]) -> str:
    return COLOURS[1] if BASE in names else _GREY if set(names) & set(BARS) else COLOURS[0]


def _short(names: Sequence[str]) -> str:
    """At most three names, GRPO first."""
    order = sorted(names, key=lambda n: (n != BASE, names.index(n)))
    return ", ".join(order[:3]) + (f" and {len(order) - 3} more" if len(order) > 3 else "")


def _bias_noise(results: Results) -> Any:
    """Bias against noise, a panel for each world; names at the best by cosine, GRPO and the bars."""
    cells = [cell for name in results.worlds if (cell := results.cell(name))]
    if not cells:
        return None
    figure = _figure(len(cells), width=3.4, height=3.4)
    for axes, cell in zip(figure.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
        named = _distinct(cell)[:5]
        for n in methods(cell, bars=True):
            x, y = estimate(cell, n, "bias"), estimate(cell, n, "noise")
            if n == BARS[1] or not math.isfinite(x.value + y.value):
                continue
            style: dict[str, Any] = {"color": _colour_of([n]), "zorder": 3 if n == BASE else 2}
            axes.plot([x.low, x.high], [y.value] * 2, linewidth=0.8, alpha=0.6, **style)
            axes.plot([x.value] * 2, [y.low, y.high], linewidth=0.8, alpha=0.6, **style)
            axes.plot([x.value], [y.value], "o", markersize=3.5, **style)
            if n in named:
                side = {"xytext": (-5, -3), "ha": "right"} if x.value > 0.6 else {"xytext": (4, 3)}
                axes.annotate(n, (x.value, y.value), textcoords="offset points", fontsize=7, **side)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set(title=cell["name"], xlabel="bias", ylabel="noise", xlim=(-0.05, 1.25))
    return figure


def _sensitivity(results: Results) -> Any:
    """The cosine along each knob, a row for each world: the best, GRPO and the exact advantage."""
    rows = [(name, knob) for name in results.worlds for knob in KNOBS if results.along(name, knob)]
    if not rows:
        return None
    names = list(dict.fromkeys(name for name, _ in rows))
    figure = _figure(len(_PANELS), width=3.2, height=2.5 * len(names) + 0.8)
    grid = figure.subplots(len(names), len(_PANELS), sharey="row", squeeze=False)
    drawn: dict[str, int] = {}
    for name, line in zip(names, grid, strict=True):
        base = results.cell(name)
        assert base is not None
        chosen = _distinct(base)
        for axes, knobs in zip(line, _PANELS, strict=True):
            knob = next((k for k in knobs if (name, k) in rows), None)
            if knob is None:
                axes.set_axis_off()
                continue
            _along(axes, results.along(name, knob), chosen, drawn)
            if knob != "verdict_error":
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.set_xticks(values := list(results.along(name, knob)), [f"{v:g}" for v in values])
            axes.set(title=name, xlabel=KNOBS[knob])
        line[0].set_ylabel("cosine")
    _legend(figure)
    return figure


def _along(axes: Any, by_value: dict[Any, Any], chosen: Sequence[str], order: dict[str, int]) -> None:
    for n in chosen:
        able = {v: estimate(c, n, "cosine") for v, c in by_value.items() if n in methods(c, bars=True)}
        _line(axes, n, list(able), list(able.values()), order)


def _distinct(cell: Any) -> list[str]:
    """The best methods that differ in their numbers, GRPO, and the exact advantage."""
    best: dict[tuple[float, float], str] = {}
    for n in ranked(cell, "cosine"):
        best.setdefault((estimate(cell, n, "cosine").value, estimate(cell, n, "bias").value), n)
    able = methods(cell, bars=True)
    return list(dict.fromkeys([n for n in (BARS[0], BASE) if n in able] + list(best.values())[:_LINES]))


def _learning(results: Results) -> Any:
    """Accuracy over tokens for each world, with intervals over seeds."""
    if not results.learned:
        return None
    figure = _figure(len(results.learned), width=4.6, height=4.2)
    order: dict[str, int] = {}
    for axes, world in zip(figure.subplots(1, len(results.learned), squeeze=False)[0], results.learned, strict=True):
        for n, by_seed in results.curves(world).items():
            curves = list(by_seed.values())
            marks = curves[0].tokens
            at = [
                mean_interval([0.0 if math.isnan(c.accuracy[i]) else c.accuracy[i] for c in curves])
                for i in range(len(marks))
            ]
            _line(axes, n, marks, at, order)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        axes.set(title=world, xlabel="tokens spent", ylabel="accuracy")
    _legend(figure)
    return figure


def _line(axes: Any, name: str, x: Sequence[Any], found: Sequence[Estimate], order: dict[str, int]) -> None:
    """A line with its band; `order` remembers which method has which colour in the figure."""
    i = len(order) if name in BARS else order.setdefault(name, len(order))
    colour = _GREY if name in BARS else COLOURS[i % len(COLOURS)]
    style = {"exact_advantage": "--", "random_credit": ":"}.get(name, "-" if i < len(COLOURS) else "-.")
    marker = MARKERS[i % len(MARKERS)] if len(x) <= 8 and name not in BARS else None
    axes.plot(
        x, [e.value for e in found], style, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=name
    )
    axes.fill_between(x, [e.low for e in found], [e.high for e in found], color=colour, alpha=0.15, linewidth=0)


def _legend(figure: Any) -> None:
    found = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 5), fontsize=8)


def _figure(panels: int, *, width: float, height: float, left: float = 0.6) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(left + width * panels, height), layout="constrained")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_FIGURES: tuple[tuple[str, str, Callable[[Results], Any]], ...] = (
    ("leaderboard", "The cosine of one group's policy gradient with the exact one, by method and world", _leaderboard),
    ("bias-noise", "Bias against noise of the credit, by world", _bias_noise),
    ("sensitivity", "What the cosine depends on: group size, wrong verdicts, length", _sensitivity),
    ("learning", "Accuracy over tokens spent, with intervals over seeds", _learning),
)
