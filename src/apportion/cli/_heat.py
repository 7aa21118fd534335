"""One rollout as text: tokens on a colour scale of credit, and the sum behind every number."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from apportion.types import Credit, Rollouts

_UP, _DOWN, _MIDDLE = (
    (0, 92, 175),
    (217, 95, 2),
    (247, 247, 247),
)  # blue, orange, nearly white: safe for the colour-blind
_DIGITS = 3
_MANY = 40
_PROMPT = Style(color="bright_black")


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens with one line in the table.

    Args:
        start, stop: positions, half-open. step: the written step they lie in, None outside of every step.
        advantage: theirs, or their mean. parts: what it is the sum of. counted: does the loss count them.
        exact: every token has exactly these numbers; otherwise they are means.
    """

    start: int
    stop: int
    step: int | None
    advantage: float
    parts: Mapping[str, float]
    counted: bool
    exact: bool


@dataclass(frozen=True)
class View:
    """Everything that is shown about one row."""

    row: int
    pieces: Sequence[str]
    action: Sequence[bool]
    counted: Sequence[bool]
    advantages: Sequence[float]
    parts: Mapping[str, Sequence[float]]
    step_ids: Sequence[int | None]
    steps: Sequence[tuple[int, int]]
    judge: Sequence[Sequence[float]] | None
    process: Sequence[float] | None
    outcome: float | None


def view_of(rollouts: Rollouts, credit: Credit, row: int) -> View:
    """The numbers of one row, as plain lists."""
    size = int(rollouts.lengths[row])
    steps, step_ids, mine = _steps(rollouts, row, size)
    per_part = {name: _at(rollouts, credit, part, row, size) for name, part in credit.parts.items()}
    outcome = rollouts.signals.get("outcome")
    known = outcome is not None and outcome.unit == "trajectory" and outcome.values.dim() == 1
    return View(
        row=row,
        pieces=_pieces(rollouts, row, size),
        action=rollouts.action_mask[row, :size].tolist(),
        counted=credit.mask[row, :size].tolist(),
        advantages=credit.advantages[row, :size].double().tolist(),
        parts=per_part,
        step_ids=step_ids,
        steps=steps,
        judge=_step_signal(rollouts, "judge", mine, axes=1),
        process=_step_signal(rollouts, "process", mine, axes=0),
        outcome=float(outcome.values[rollouts.trajectory_ids[row]]) if outcome is not None and known else None,
    )


def _at(rollouts: Rollouts, credit: Credit, part: Any, row: int, size: int) -> list[float]:
    values = torch.where(credit.mask, rollouts.at_tokens(part), 0.0)[row, :size]
    out: list[float] = values.double().tolist()
    return out


def _pieces(rollouts: Rollouts, row: int, size: int) -> list[str]:
    """The texts of the tokens; token ids where texts were not recorded."""
    pieces = rollouts.meta["pieces"][row] if "pieces" in rollouts.meta else None
    if pieces is not None and len(pieces) >= size:
        return [str(x) for x in pieces[:size]]
    ids = range(size) if rollouts.tokens is None else rollouts.tokens[row, :size].tolist()
    return [f"{x} " for x in ids]


def _steps(rollouts: Rollouts, row: int, size: int) -> tuple[list[tuple[int, int]], list[int | None], Any]:
    ids: list[int | None] = [None] * size
    if "step" not in rollouts.spans:
        return [], ids, None
    spans = rollouts.spans["step"]
    mine = (spans.row == row).nonzero().flatten()
    mine = mine[torch.argsort(spans.start[mine], stable=True)]
    steps = list(zip(spans.start[mine].tolist(), spans.stop[mine].tolist(), strict=True))
    for i, (start, stop) in enumerate(steps):
        ids[start:stop] = [i] * (stop - start)
    return steps, ids, mine


def _step_signal(rollouts: Rollouts, name: str, mine: Any, *, axes: int) -> Any:
    signal = rollouts.signals.get(name)
    known = signal is not None and signal.unit == "step" and signal.values.dim() == 1 + axes
    return signal.values[mine].double().tolist() if signal is not None and known else None


# ---- stretches: one line of the table each ------------------------------------------------------------------------


def stretches(view: View, *, every_token: bool = False) -> list[Stretch]:
    """Neighbours with equal numbers; where these are too many, one stretch per step with the means."""
    exact = _cut(view, lambda t: (view.step_ids[t], view.counted[t], *_numbers(view, t), t if every_token else 0))
    if every_token or len(exact) <= _MANY:
        return exact
    return _cut(view, lambda t: (view.step_ids[t], view.counted[t]))


def _numbers(view: View, t: int) -> tuple[float, ...]:
    return (view.advantages[t], *(values[t] for values in view.parts.values()))


def _cut(view: View, key: Any) -> list[Stretch]:
    out: list[Stretch] = []
    start = 0
    for t in range(1, len(view.pieces) + 1):
        if t == len(view.pieces) or view.action[t] != view.action[start] or key(t) != key(start):
            if view.action[start]:
                out.append(_stretch(view, start, t))
            start = t
    return out


def _stretch(view: View, start: int, stop: int) -> Stretch:
    def mean(values: Sequence[float]) -> float:
        return values[start] if exact else sum(values[start:stop]) / (stop - start)

    exact = all(_numbers(view, t) == _numbers(view, start) for t in range(start, stop))
    parts = {name: mean(values) for name, values in view.parts.items()}
    return Stretch(start, stop, view.step_ids[start], mean(view.advantages), parts, view.counted[start], exact)


def written_sum(advantage: float, parts: Mapping[str, float], digits: int = _DIGITS) -> str:
    """`+0.78 = +1.46 outcome -0.68 baseline`: rounded so that the printed numbers add up, too.

    What the parts leave unexplained beyond rounding is shown as `unexplained`.
    """
    if not all(map(math.isfinite, (advantage, *parts.values()))):
        return f"{advantage} = " + " ".join(f"{x:+} {visible(name)}" for name, x in parts.items())
    scale = 10**digits
    rest = advantage - sum(parts.values())
    if parts and abs(rest) > 0.5 / scale + 1e-6 * max(abs(x) for x in parts.values()):
        parts = {**parts, "unexplained": rest}
    total, ticks = round(advantage * scale), {name: round(x * scale) for name, x in parts.items()}
    missing = total - sum(ticks.values())
    one = 1 if missing > 0 else -1
    worst_first = sorted(parts, key=lambda name: one * (ticks[name] - parts[name] * scale))
    for name, _ in zip(cycle(worst_first), range(abs(missing)), strict=False):
        ticks[name] += one
    terms = " ".join(f"{_signed(n / scale, parts[name], digits)} {visible(name)}" for name, n in ticks.items())
    return _signed(total / scale, advantage, digits) + (f" = {terms}" if terms else "")


def _signed(rounded: float, exact: float, digits: int) -> str:
    return f"{'-' if rounded < 0 or (rounded == 0 and exact < 0) else '+'}{abs(rounded):.{digits}f}"


# ---- text that others wrote -----------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Control, formatting and unassigned characters spelt out, so that model text cannot steer the terminal."""
    return "".join(c if unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" else _escaped(c) for c in text)


def visible_lines(text: str) -> str:
    """The same, but for line breaks and tabs, which the terminal may obey."""
    return "".join(c if c in "\n\t" else visible(c) for c in text)


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode()


# ---- drawing ------------------------------------------------------------------------------------------------------------


def colour(value: float, scale: float) -> Style:
    """Blue for credit, orange for blame, nothing for zero; a number that is not finite is reversed."""
    if not math.isfinite(value):
        return Style(reverse=True)
    share = min(abs(value) / scale, 1.0) if scale > 0 else 0.0
    if share == 0.0:
        return Style()
    share = 0.15 + 0.85 * share  # the smallest credit is still seen
    red, green, blue = (
        round(m + share * (end - m)) for m, end in zip(_MIDDLE, _UP if value > 0 else _DOWN, strict=True)
    )
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    return Style(color="white" if dark else "black", bgcolor=f"rgb({red},{green},{blue})")


def scale_of(view: View) -> float:
    """The largest credit or blame in the row: the end of the colour scale."""
    counted = (abs(a) for a, counts in zip(view.advantages, view.counted, strict=True) if counts)
    return max(filter(math.isfinite, counted), default=0.0)


def heat_map(view: View) -> Text:
    """The whole row: the prompt grey, each token of the response on its colour, each step opened by its number."""
    text, scale = Text(), scale_of(view)
    starts = {start: i for i, (start, stop) in enumerate(view.steps) if stop > start}
    for t, piece in enumerate(view.pieces):
        if t in starts and view.action[t]:
            text.append("" if text.plain.endswith("\n") or not text.plain else "\n")
            text.append(f"{starts[t] + 1:>3} | ", _PROMPT)
        style = colour(view.advantages[t], scale) if view.counted[t] else _PROMPT
        text.append(_shown(piece, "\u23ce\n" if view.action[t] else "\n"), style)
    return text


def _shown(piece: str, line_break: str) -> str:
    return line_break.join(visible(line) for line in piece.replace("\r\n", "\n").split("\n"))


def legend(view: View) -> Text:
    """The colour scale with its ends."""
    scale = scale_of(view)
    if scale == 0:
        return Text("no credit: every advantage is 0")
    text = Text(f"credit {-scale:+.{_DIGITS}f} ")
    for i in range(-6, 7):
        text.append("  " if i else " 0 ", colour(i / 6, 1.0))
    return text.append(f" {scale:+.{_DIGITS}f}; grey: prompt, or not counted by the loss")


def sums(view: View, *, every_token: bool = False) -> RenderableType:
    """A table with the sum behind the credit of each stretch, and the verdicts on its step."""
    lines = stretches(view, every_token=every_token)
    columns = ["step", "tokens", "credit = its parts", *(["judge"] if view.judge else []), "text"]
    columns[-1:-1] = ["process"] if view.process else []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold" if name != "text" else "ellipsis", no_wrap=name in ("step", "text"))
    for line in lines:
        table.add_row(*_cells(view, line))
    notes = [] if all(line.exact for line in lines) else [Text("~ the mean over the tokens of that line")]
    return Group(table, *notes)


def _cells(view: View, line: Stretch) -> list[Text]:
    total = written_sum(line.advantage, line.parts) if line.counted else "not counted by the loss"
    cells = [
        "" if line.step is None else str(line.step + 1),
        f"{line.start}-{line.stop - 1}" if line.stop - line.start > 1 else str(line.start),
        total if line.exact else f"~ {total}",
    ]
    if view.judge:
        cells.append("" if line.step is None else verdicts(view.judge[line.step]))
    if view.process:
        cells.append("" if line.step is None else f"{view.process[line.step]:+.{_DIGITS}f}")
    snippet = visible("".join(view.pieces[line.start : line.stop]).strip())
    return [Text(cell) for cell in [*cells, snippet[:60]]]


def verdicts(critiques: Sequence[float]) -> str:
    """`wrong 2 of 3`, `ok`, `not judged`; critiques that were unusable do not count."""
    usable = [x for x in critiques if x == x]
    wrong = sum(1 for x in usable if x > 0.5)
    if not usable:
        return "not judged"
    if len(critiques) == 1:
        return "wrong" if wrong else "ok"
    return f"wrong {wrong} of {len(usable)}" if wrong else f"ok {len(usable)} of {len(usable)}"
