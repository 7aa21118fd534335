"""Random ragged batches: several rows a trajectory, groups of any size, gaps in the mask, unmeasured things.

A method that reads a signal of a new name gives it a random one in `_with_more`; the laws then run over the method.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

import torch

from apportion import Rollouts, Signal, Spans


def random_batch(seed: int, *, dtype: torch.dtype = torch.float64, unmeasured: bool = True) -> Rollouts:
    """A batch with every field that any method reads, rows shuffled."""
    rng = Random(seed)
    rows = []
    for group in range(rng.randint(1, 4)):
        for member in range(rng.randint(1, 5)):
            rows += [(group, f"{group}.{member}", place) for place in range(1 if rng.random() < 0.7 else 2)]
    rng.shuffle(rows)
    lengths = [rng.randint(0, 9) for _ in rows]
    masks = [[rng.random() < 0.8 for _ in range(n)] for n in lengths]
    trajectories = len({name for _, name, _ in rows})
    steps, halves = _steps(rng, rows, lengths), [[(0, n // 2), (n // 2, n)] for n in lengths]
    count = sum(map(len, steps))

    def floats(low: float, high: float) -> list[list[float]]:
        return [[rng.uniform(low, high) for _ in range(n)] for n in lengths]

    def maybe(value: float, chance: float = 0.15) -> float:
        return float("nan") if unmeasured and rng.random() < chance else value

    outcomes = [maybe(rng.choice([0.0, 1.0, 0.25, 0.99])) for _ in range(trajectories)]
    r = Rollouts.from_lists(
        [[rng.randint(0, 2) for _ in range(n)] for n in lengths],
        [g for g, _, _ in rows],
        action_mask=masks,
        trajectories=[name for _, name, _ in rows],
        row_index=[place for _, _, place in rows],
        outcome=outcomes,
        logprobs=floats(-3, 0),
        old_logprobs=floats(-3, 0),
        ref_logprobs=floats(-3, 0),
        values=floats(-1, 1),
        bootstrap=[rng.uniform(-1, 1) for _ in rows],
        truncated=[rng.random() < 0.3 for _ in rows],
        spans={"half": Spans.from_lists(halves)},
        dtype=dtype,
    )
    flat = [(b, s, e, i) for b, row in enumerate(steps) for s, e, i in row]
    columns = torch.tensor(flat, dtype=torch.int64).reshape(-1, 4).unbind(1)
    verdicts = [[maybe(float(rng.random() < 0.4), 0.3) for _ in range(3)] for _ in range(count)]
    scores = [maybe(rng.uniform(-1, 1)) for _ in range(count)]
    r = r.with_spans(step=Spans(*columns)).with_signals(
        judge=Signal(torch.tensor(verdicts, dtype=dtype).reshape(-1, 3), "step", ("critiques",)),
        process=Signal(torch.tensor(scores, dtype=dtype), "step"),
    )
    return _with_more(rng, r, maybe, dtype)


def _with_more(rng: Random, r: Rollouts, maybe: Callable[..., float], dtype: torch.dtype) -> Rollouts:
    """What single methods read: turns with states, trees of spans, statistics of the model, further rewards."""

    def signal(unit: str, draw: Callable[[], float], axis: tuple[str, int] | None = None) -> Signal:
        count = r.units(unit)
        each = (r.batch, r.width) if unit == "token" else (count,)
        shape = (*each, axis[1]) if axis else each
        values = torch.tensor([draw() for _ in range(math.prod(shape))], dtype=dtype).reshape(shape)
        return Signal(values, unit, (axis[0],) if axis else ())

    def uniform(low: float, high: float, chance: float = 0.0) -> Callable[[], float]:
        return lambda: maybe(rng.uniform(low, high), chance) if chance else rng.uniform(low, high)

    def flag(rate: float, chance: float = 0.15) -> Callable[[], float]:
        return lambda: maybe(float(rng.random() < rate), chance)

    r = r.with_spans(turn=_turns(rng, r), budget=_budgets(rng, r), branch=_branches(rng, r), attempt=_attempts(r))
    r = r.with_spans(macro=_macros(r))
    summary = r.spans["budget"].parent >= 0
    score = signal("budget", flag(0.5))
    return r.with_signals(
        format=signal("trajectory", flag(0.7)),
        greedy_outcome=signal("group", uniform(0, 1, 0.15)),
        turn_reward=signal("turn", uniform(-1, 1, 0.15)),
        duration=signal("turn", uniform(0.1, 9, 0.15)),
        subgoal=signal("turn", flag(0.3), ("subgoals", 2)),
        label=signal("step", flag(0.6)),
        factors=signal("step", uniform(0, 2, 0.1), ("factors", 2)),
        decoded=signal("step", uniform(-1, 1, 0.15)),
        attempt_reward=signal("attempt", flag(0.5)),
        score=replace(score, values=torch.where(summary, score.values, torch.nan)),
        entropy=signal("token", uniform(0, 3)),
        self_certainty=signal("token", uniform(1, 6)),
        sampled_logit=signal("token", uniform(5, 20)),
        sum_pi_squared=signal("token", uniform(0.05, 1)),
        waad=signal("token", uniform(0, 9)),
        fai=signal("token", uniform(0, 0.1)),
        planning=signal("token", flag(0.3, 0.0)),
        log_ratio=signal("token", uniform(-1, 1)),
        contrast=signal("token", uniform(-2, 2)),
        goal_cosine=signal("token", uniform(-1, 1)),
        kl_coef=signal("batch", uniform(0, 0.2)),
    )


def _from_rows(rows: list[tuple[int, int, int, int, int, int]]) -> Spans:
    """Spans of (row, start, stop, index, state, parent)."""
    return Spans(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 6).unbind(1))


def _in_time(r: Rollouts) -> list[list[int]]:
    """The rows of each trajectory, in the order of time."""
    rows = [[b for b in range(r.batch) if int(r.trajectory_ids[b]) == n] for n in range(r.num_trajectories)]
    return [sorted(mine, key=lambda b: int(r.row_index[b])) for mine in rows]


def _cut(rng: Random, length: int, most: int) -> list[tuple[int, int]]:
    """1 to `most` spans that tile the row; some are empty."""
    edges = [0, *sorted(rng.randint(0, length) for _ in range(rng.randint(0, most - 1))), length]
    return list(pairwise(edges))


def _turns(rng: Random, r: Rollouts) -> Spans:
    """Turns tile the rows; their states are few, so that many turns begin in the same situation."""
    out = []
    for rows in _in_time(r):
        cut = [(b, s, e) for b in rows for s, e in _cut(rng, int(r.lengths[b]), 3)]
        out += [(b, s, e, i, rng.randint(0, 2), -1) for i, (b, s, e) in enumerate(cut)]
    return _from_rows(out)


def _budgets(rng: Random, r: Rollouts) -> Spans:
    """Thinking segments (parent -1, index = budget) in the first row; summaries (children) behind them or in later rows.

    The last segment is summarised first, so that most budgets have a score.
    """
    out: list[tuple[int, int, int, int, int, int]] = []
    for rows in _in_time(r):
        first, segments, unseen = len(out), 0, 0
        for place, b in enumerate(rows):
            for k, (s, e) in enumerate(_cut(rng, int(r.lengths[b]), 4)):
                if place == 0 and k < 3 and (k == 0 or rng.random() < 0.7) and segments == len(out) - first:
                    out.append((b, s, e, segments, 0, -1))
                    segments = unseen = segments + 1
                else:
                    under, unseen = rng.randrange(segments) if not unseen else unseen - 1, max(unseen - 1, 0)
                    out.append((b, s, e, under, 0, first + under))
    return _from_rows(out)


def _branches(rng: Random, r: Rollouts) -> Spans:
    """A tree for each group: a trajectory is a chain of edges; its last is a leaf, its first continues another's inner edge.

    What an unmeasured trajectory begins nobody continues, so that the tree stays the same without it.
    """
    out: list[tuple[int, int, int, int, int, int]] = []
    inner: dict[int, list[int]] = {}
    for rows in _in_time(r):
        mine = inner.setdefault(int(r.group_ids[rows[0]]), [])
        parent = rng.choice([-1, *mine])
        chain = [(b, s, e) for b in rows for s, e in _cut(rng, int(r.lengths[b]), 3)]
        for k, (b, s, e) in enumerate(chain):
            depth = 0 if parent < 0 else out[parent][3] + 1
            out.append((b, s, e, depth, 0, parent))
            parent = len(out) - 1
            if k + 1 < len(chain) and not math.isnan(r.signals["outcome"].values[r.trajectory_ids[b]]):
                mine.append(parent)
    return _from_rows(out)


def _attempts(r: Rollouts) -> Spans:
    """Two attempts in every trajectory: the halves of its row, or its two rows."""
    out = []
    for rows in _in_time(r):
        lengths = [int(r.lengths[b]) for b in rows]
        cut = [(rows[0], 0, lengths[0] // 2), (rows[0], lengths[0] // 2, lengths[0])]
        cut = cut if len(rows) == 1 else [(b, 0, n) for b, n in zip(rows, lengths, strict=True)]
        out += [(b, s, e, i, 0, -1) for i, (b, s, e) in enumerate(cut)]
    return _from_rows(out)


def _macros(r: Rollouts) -> Spans:
    """Two actions each, or one at the end of an unbroken run of actions."""
    out = []
    for rows in _in_time(r):
        index = 0
        for b in rows:
            t = 0
            while t < int(r.lengths[b]):
                size = 1 + bool(t + 1 < int(r.lengths[b]) and r.action_mask[b, t + 1])
                if r.action_mask[b, t]:
                    out.append((b, t, t + size, index, 0, -1))
                    index, t = index + 1, t + size
                else:
                    t += 1
    return _from_rows(out)


def _steps(rng: Random, rows: list, lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Disjoint spans that need not tile their row, some empty; the ordinal counts within the trajectory."""
    cut = []
    for n in lengths:
        edges = sorted(rng.randint(0, n) for _ in range(2 * rng.randint(0, 3)))
        cut.append(list(zip(edges[::2], edges[1::2], strict=True)))
    before: dict[tuple[str, int], int] = {}
    for (_, name, place), spans in zip(rows, cut, strict=True):
        before[name, place + 1] = len(spans)
    return [
        [(s, e, i + (before.get((name, place), 0) if place else 0)) for i, (s, e) in enumerate(spans)]
        for (_, name, place), spans in zip(rows, cut, strict=True)
    ]


def padded(r: Rollouts, more: int) -> Rollouts:
    """The same batch with further padding on the right, filled with junk."""

    def longer(x: torch.Tensor | None, fill: float) -> torch.Tensor | None:
        return None if x is None else torch.cat([x, x.new_full((len(x), more), fill)], 1)

    junk = {n: longer(getattr(r, n), 7.0) for n in ("logprobs", "old_logprobs", "ref_logprobs", "values")}
    at_tokens = {k: replace(v, values=longer(v.values, 7.0)) for k, v in r.signals.items() if v.unit == "token"}
    return r.replace(
        tokens=longer(r.tokens, 1),
        action_mask=longer(r.action_mask, False),
        signals={**r.signals, **at_tokens},
        **junk,
    )


def with_outcome(r: Rollouts, values: torch.Tensor) -> Rollouts:
    return r.with_signals(outcome=replace(r.signals["outcome"], values=values))
