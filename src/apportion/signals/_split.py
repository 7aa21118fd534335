"""Written steps as token-exact spans: lines, sentences, paragraphs, or any pattern.

Rules, the same for every splitter:

- A pattern describes *separators*. A separator belongs to the step before it; the next step begins right after it.
- A token that straddles a boundary belongs to the step in which it starts. A step in which no token starts vanishes.
- A step of nothing but white space joins the step before it (the first one joins the step after it). So do the
  end-of-text token and other trailing special tokens.
- A response of nothing but white space and special tokens has no steps.
- Prompt, tool output and padding (`action_mask` False) are in no step: each unbroken run of actions is split by itself.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from apportion.types import Rollouts, Spans

# A whole token such as <|im_end|>, </s>, <eos> or [SEP]; it counts as special only at the end of a run of actions.
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")

# Possessive (++), and a lookbehind before each run, so that hostile text costs linear time.
_LINES = r"\n"
_BLANK_LINES = r"\n[^\S\n]*+\n"
_SENTENCES = r"(?m)^[^\S\n]*+\d++[.)](?P<keep>)|(?<![.!?])[.!?]++[\"')\]”’*]*+\s++|[。！？]|\n"


@dataclass(frozen=True)
class Splitter:
    """`splitter(rollouts) -> Spans`: the written steps, in row order; `index` counts within the trajectory.

    Reads: meta["pieces"], action_mask, trajectory_ids, row_index. Scope: row.
    Degenerate: an empty response has no steps.

    Args:
        expression: the call that makes it, which is also its `repr`.
        regex: what separates two steps; where a group named `keep` takes part in the match there is no boundary.

    Raises:
        ValueError: meta["pieces"] is missing or has another length than a row.
    """

    expression: str
    regex: re.Pattern[str] = field(repr=False)

    def __repr__(self) -> str:
        return self.expression

    def __call__(self, rollouts: Rollouts) -> Spans:
        pieces = rollouts.meta.get("pieces")
        if pieces is None:
            raise ValueError(
                f'{self} needs meta["pieces"], one string per token, which this batch lacks. Make it with pieces_of.'
            )
        mask, lengths = rollouts.action_mask.tolist(), rollouts.lengths.tolist()
        rows = []
        for b, (row, keep, n) in enumerate(zip(pieces, mask, lengths, strict=True)):
            if len(row) != n:
                raise ValueError(f'meta["pieces"] of row {b} has {len(row)} strings but the row has {n} tokens.')
            rows.append([span for start, stop in _runs(keep[:n]) for span in self._steps(row, start, stop)])
        return _numbered(rollouts, rows)

    def _steps(self, pieces: Sequence[str], start: int, stop: int) -> list[tuple[int, int]]:
        """The steps of one run of actions, `[start, stop)`."""
        run = list(pieces[start:stop])
        text, offsets = "".join(run), [0, *accumulate(len(p) for p in run)][:-1]
        cuts = {bisect_left(offsets, m.end()) for m in self.regex.finditer(text) if m.groupdict().get("keep") is None}
        edges = [0, *sorted(cuts - {0, len(run)}), len(run)]
        return [(start + a, start + b) for a, b in _without_blanks(edges, run)]


def lines() -> Splitter:
    """One step per line."""
    return Splitter("lines()", re.compile(_LINES))


def sentences() -> Splitter:
    """One step per sentence, ended by `.`, `!` or `?` and white space (so not the point of 3.5), or by a line break.

    The number of a list item (`1. `) ends no sentence. Abbreviations do; use `lines` or `pattern` where that matters.
    """
    return Splitter("sentences()", re.compile(_SENTENCES))


def blank_lines() -> Splitter:
    """One step per paragraph: CAPO's steps."""
    return Splitter("blank_lines()", re.compile(_BLANK_LINES))


def pattern(regex: str) -> Splitter:
    r"""Steps separated by a regular expression; an empty match is a boundary too, as in `(?=Step \d)`.

    Raises:
        ValueError: the expression cannot be compiled.
    """
    try:
        return Splitter(f"pattern({regex!r})", re.compile(regex))
    except re.error as error:
        raise ValueError(f"pattern needs a regular expression; {regex!r} is none: {error}.") from error


def step_texts(rollouts: Rollouts, name: str = "step") -> list[str]:
    """The text of every span of the named set, in the order of the set, without special tokens at its end."""
    spans = rollouts.spans[name]
    pieces = rollouts.meta.get("pieces")
    if pieces is None:
        raise ValueError('a judge needs meta["pieces"], one string per token. Make it with pieces_of.')
    where = zip(spans.row.tolist(), spans.start.tolist(), spans.stop.tolist(), strict=True)
    return ["".join(pieces[b][start : _end(pieces[b], start, stop)]) for b, start, stop in where]


def steps_by_trajectory(rollouts: Rollouts, name: str = "step") -> list[list[int]]:
    """For every trajectory, the positions of its spans in the named set, in the order they were written."""
    spans = rollouts.spans[name]
    out: list[list[int]] = [[] for _ in range(rollouts.num_trajectories)]
    index, row = spans.index.tolist(), rollouts.trajectory_ids[spans.row].tolist()
    for s in sorted(range(len(spans)), key=index.__getitem__):
        out[row[s]].append(s)
    return out


def _runs(mask: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Unbroken stretches of True."""
    start = None
    for t, on in enumerate([*mask, False]):
        if on and start is None:
            start = t
        elif not on and start is not None:
            yield start, t
            start = None


def _end(pieces: Sequence[str], start: int, stop: int) -> int:
    """Where the writing ends: before the white space and the special tokens at the end."""
    while stop > start and (not pieces[stop - 1].strip() or _SPECIAL.fullmatch(pieces[stop - 1])):
        stop -= 1
    return stop


def _without_blanks(edges: Sequence[int], run: Sequence[str]) -> list[tuple[int, int]]:
    """Spans between the edges; a blank one joins the span before it, or at the very start the one after it."""
    end = _end(run, 0, len(run))
    out: list[tuple[int, int]] = []
    for a, b in pairwise(edges):
        if "".join(run[a : min(b, end)]).strip():
            out.append((a if out else 0, b))
        elif out:
            out[-1] = (out[-1][0], b)
    return out


def _numbered(rollouts: Rollouts, rows: Sequence[Sequence[tuple[int, int]]]) -> Spans:
    """`Spans` of the rows, their ordinals counted through all rows of a trajectory."""
    spans = Spans.from_lists(rows)
    trajectory, place = rollouts.trajectory_ids.tolist(), rollouts.row_index.tolist()
    before, seen = [0] * len(rows), [0] * rollouts.num_trajectories
    for b in sorted(range(len(rows)), key=place.__getitem__):
        before[b] = seen[trajectory[b]]
        seen[trajectory[b]] += len(rows[b])
    index = spans.index + torch.tensor(before, dtype=torch.int64)[spans.row]
    d = rollouts.device
    return Spans(row=spans.row.to(d), start=spans.start.to(d), stop=spans.stop.to(d), index=index.to(d))
