"""`apportion compare RUN RUN ...`"""

from pathlib import Path
from typing import Annotated, Any

import tyro

from apportion.cli._app import OptionalPath, call, console, print_json
from apportion.cli._curves import SLACK, Curve, Group, before_after, budget, curve, group_runs, stopped
from apportion.cli._errors import UserError

_PANELS = {"accuracy": ("eval", "accuracy", "held-out accuracy"), "reward": ("train", "reward", "training reward")}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # safe for the colour-blind

_LABEL = 140


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(compare, argv)


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, *, out: OptionalPath = None, json: bool = False
) -> int:
    """Compare runs on equal sampled tokens: accuracy before and after, and learning curves.

    Runs that differ only in the seed are one line. The difference is paired over held-out problems; its 95 %
    interval resamples problems, and seeds where there are several.

    Examples:
      apportion compare runs/grpo-0 runs/capo-0
      apportion compare runs/grpo-* runs/capo-* --out curves.png
      apportion compare runs/* --json

    Args:
        runs: run folders, as written by train.
        out: the picture; compare.png if neither this nor --json is given.
        json: print the numbers, curves included, as JSON.
    """
    if not runs:
        raise UserError("compare needs at least one run folder. Example: apportion compare runs/grpo runs/capo")
    groups = group_runs(list(runs))
    tokens = budget(groups)
    rows = [_row(group, tokens) for group in groups]
    if json:
        print_json({"tokens": tokens, "groups": rows})
    else:
        _print_table(rows, tokens)
    picture = out if out is not None or json else Path("compare.png")
    if picture is not None:
        _draw(groups, picture)
    if picture is not None and not json:
        print(f"curves: {picture}")
    return 0


def _row(group: Group, tokens: float | None) -> dict[str, Any]:
    reward = curve(group.runs, "train", "reward")
    return {
        "label": group.label,
        "credit": group.credit,
        "runs": [str(run.path) for run in group.runs],
        "seeds": [run.info.get("seed") for run in group.runs],
        **before_after(group, float("inf") if tokens is None else tokens),
        "stopped": [stop for run in group.runs if (stop := stopped(run))],
        "last_reward": None if reward is None else float(reward.mean[-1]),
        "curves": {name: _numbers(curve(group.runs, kind, key)) for name, (kind, key, _) in _PANELS.items()},
    }


def _numbers(line: Curve | None) -> dict[str, Any] | None:
    if line is None:
        return None
    return {name: None if x is None else x.tolist() for name, x in vars(line).items()}


def _print_table(rows: list[dict[str, Any]], tokens: float | None) -> None:
    from rich.text import Text

    table = _table()
    for name in ("seeds", "tokens", "before", "after", "difference", "95 % interval", "problems", "last reward"):
        table.add_column(name, justify="right", no_wrap=name == "95 % interval")
    for row in rows:
        low_high = row["interval"]
        table.add_row(
            Text(row["label"]),
            str(len(row["runs"])),
            _number(row["tokens"], ",.0f"),
            _number(row["before"], ".3f"),
            _number(row["after"], ".3f"),
            _number(row["difference"], "+.3f"),
            f"{low_high[0]:+.3f} to {low_high[1]:+.3f}" if low_high else "-",
            _number(row["problems"], "d"),
            _number(row["last_reward"], ".3f"),
        )
    out = console()
    out.print(table)
    if tokens is None:
        out.print("No run has been evaluated twice yet: there is no before and after.")
    else:
        out.print(
            f"after = the last evaluation within {tokens:,.0f} sampled tokens (up to {SLACK:.0%} more), "
            "which every run evaluated twice has reached; tokens = mean over seeds at that evaluation"
        )
    _print_also(rows)
    for stop in (stop for row in rows for stop in row["stopped"]):
        out.print(Text(f"\n{stop['run']} stopped early, after step {stop['step']}: {stop['reason']}"))


def _print_also(rows: list[dict[str, Any]]) -> None:
    """What else the evaluations measured, before and after, as far as there is any."""
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row["also"]))
    if not names:
        return
    table = _table()
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        pairs = [row["also"].get(name) for name in names]
        table.add_row(Text(row["label"]), *("-" if p is None else f"{p[0]:.3g} -> {p[1]:.3g}" for p in pairs))
    console().print("\nalso measured, before -> after:")
    console().print(table)


def _table() -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("credit", overflow="fold", min_width=20)
    return table


def _number(x: Any, form: str) -> str:
    return "-" if x is None else format(x, form)


def _draw(groups: list[Group], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (kind, key, title) in zip(figure.subplots(1, 2), _PANELS.values(), strict=True):
        for i, group in enumerate(groups):
            _draw_curve(axes, curve(group.runs, kind, key), group, _COLOURS[i % len(_COLOURS)])
        axes.set(title=title, xlabel="sampled tokens")
        axes.grid(alpha=0.3)
    if drawn := {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }:
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower left", fontsize=8)
    try:
        figure.savefig(picture, dpi=150)
    except ValueError as error:
        raise UserError(f"--out {picture}: {error}") from None


def _draw_curve(axes: Any, line: Curve | None, group: Group, colour: str) -> None:
    if line is None:
        return
    seeds = len(group.runs)
    label = group.label if len(group.label) <= _LABEL else group.label[: _LABEL - 3] + "..."
    label = f"{label} ({seeds} seeds, 95 % interval)" if seeds > 1 else f"{label} (1 seed)"
    axes.plot(line.tokens, line.mean, color=colour, label=label.replace("$", r"\$"))
    if line.low is not None:
        axes.fill_between(line.tokens, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
