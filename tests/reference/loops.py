"""The equations of the methods, one trajectory and one token at a time. Nothing here is fast, or shared with the library."""

import math
from dataclasses import dataclass, field

import torch

from apportion import Rollouts

NAN = float("nan")


@dataclass
class Step:
    """A span: its number in the set, its ordinal, and the (row, position) pairs of its actions."""

    number: int
    index: int
    actions: list[tuple[int, int]]


@dataclass
class Episode:
    """A trajectory: its group, its actions in the order of time, its steps."""

    group: int
    outcome: float
    rows: list[int]
    actions: list[tuple[int, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def episodes(r: Rollouts, spans: str = "step") -> list[Episode]:
    out = []
    for n in range(r.num_trajectories):
        rows = [b for b in range(r.batch) if int(r.trajectory_ids[b]) == n]
        rows.sort(key=lambda b: int(r.row_index[b]))
        e = Episode(int(r.group_ids[rows[0]]), float(r.signals["outcome"].values[n]), rows)
        e.actions = [(b, t) for b in rows for t in range(r.width) if r.action_mask[b, t]]
        s = r.spans[spans]
        for b in rows:
            mine = sorted((int(s.start[k]), k) for k in range(len(s)) if int(s.row[k]) == b)
            for _, k in mine:
                inside = [(b, t) for t in range(int(s.start[k]), int(s.stop[k])) if r.action_mask[b, t]]
                e.steps.append(Step(k, int(s.index[k]), inside))
        out.append(e)
    return out


def blank(r: Rollouts) -> list[list[float]]:
    return [[0.0] * r.width for _ in range(r.batch)]


def put(table: list[list[float]], actions: list[tuple[int, int]], values: list[float]) -> None:
    for (b, t), v in zip(actions, values, strict=True):
        table[b][t] = v


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / len(xs) if xs else 0.0


def deviation(xs: list[float], ddof: int = 1) -> float:
    if len(xs) <= ddof:
        return 0.0
    m = mean(xs)
    return math.sqrt(math.fsum((x - m) ** 2 for x in xs) / (len(xs) - ddof))


def group_relative(
    r: Rollouts,
    baseline: str = "mean",
    scale: str | None = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    inside: str = "std",
) -> list[list[float]]:
    all_measured = [float(v) for v in r.signals["outcome"].values if not math.isnan(v)]
    table = blank(r)
    every = episodes(r)
    for e in every:
        mates = [k.outcome for k in every if k.group == e.group and not math.isnan(k.outcome)]
        alone = len(mates) < 2 and not (baseline == "none" and scale in (None, "batch_std"))
        if math.isnan(e.outcome) or alone:
            continue
        others = list(mates)
        others.remove(e.outcome)
        base = {"mean": mean(mates), "leave_one_out": mean(others), "none": 0.0}[baseline]
        pool = {"std": mates, "leave_one_out_std": others, "batch_std": all_measured}.get(scale or "", mates)
        divisor = 1.0
        if scale in ("std", "leave_one_out_std", "batch_std"):
            d = deviation(pool, ddof)
            divisor = d + eps if inside == "std" else math.sqrt(d * d + eps)
            if len(set(pool)) < 2 or len(pool) <= ddof:
                continue
        elif scale == "mean":
            divisor = mean(mates) + eps
            if len(set(mates)) < 2:
                continue
        elif baseline != "none" and len(set(mates)) < 2:
            continue
        put(table, e.actions, [(e.outcome - base) / divisor] * len(e.actions))
    return table


def capo(r: Rollouts, vote: str, correct: float = 2.0, penalty: float = 1.0, eps: float = 1e-6) -> list[list[float]]:
    every = episodes(r)
    rewards = [dict.fromkeys(e.actions, correct * e.outcome) for e in every]
    for e, reward in zip(every, rewards, strict=True):
        for step in e.steps:
            verdicts = [float(v) for v in r.signals["judge"].values[step.number] if not math.isnan(v)]
            c, k = sum(verdicts), len(verdicts)
            wrong = {
                "intersection": float(k > 0 and c == k),
                "majority": float(c > 0 and c >= k / 2),
                "union": float(c > 0),
                "average": c / k if k else 0.0,
            }[vote]
            for a in step.actions:
                reward[a] -= penalty * wrong
    table = blank(r)
    for e, reward in zip(every, rewards, strict=True):
        mates = [x for k, x in zip(every, rewards, strict=True) if k.group == e.group and not math.isnan(k.outcome)]
        pool = [v for x in mates for v in x.values()]
        alone = sum(bool(x) for x in mates) < 2
        if math.isnan(e.outcome) or alone or max(pool) - min(pool) < 1e-11:
            continue
        put(table, e.actions, [(reward[a] - mean(pool)) / (deviation(pool) + eps) for a in e.actions])
    return table


def pure(
    r: Rollouts,
    temperature: float | None = 0.1,
    coef: float = 1.0,
    gamma: float = 1.0,
    baseline: str = "horizon",
    horizon: int | None = None,
    unmeasured: str = "drop",
) -> list[list[float]]:
    every = episodes(r)
    gains, totals, counts = [], [], []
    for e in every:
        scored = [(s, float(r.signals["process"].values[s.number])) for s in e.steps if s.actions]
        scored = [(s, p) for s, p in scored if not math.isnan(p)]
        at_end: dict[tuple[int, int], float] = {}
        if temperature is None:
            at_end = {s.actions[-1]: p for s, p in scored}
            gain = []
            for t in range(len(e.actions)):
                rest = [at_end[a] for a in e.actions[t:] if a in at_end]
                gain.append(min(rest) if rest else 0.0)
        else:
            low = min((p for _, p in scored), default=0.0)
            weights = [math.exp(-(p - low) / temperature) for _, p in scored]
            at_end = {s.actions[-1]: w / sum(weights) * p for (s, p), w in zip(scored, weights, strict=True)}
            gain = discounted([at_end.get(a, 0.0) for a in e.actions], gamma)
        gains.append(gain)
        totals.append(sum(at_end.values()))
        counts.append(len(scored))
    table = blank(r)
    for i, e in enumerate(every):
        group = [k for k, x in enumerate(every) if x.group == e.group]
        counted = [k for k in group if not math.isnan(every[k].outcome)]
        labelled = bool(counted) and coef != 0
        if coef == 0 or (not counted and unmeasured == "process"):
            counted = group
        if i not in counted or len(counted) < 2:
            continue
        others = [k for k in counted if k != i]
        u = coef * (e.outcome - mean([every[k].outcome for k in others])) if labelled else 0.0
        limit = horizon or max(1, max(len(every[k].actions) for k in group))
        scored_ends = {
            s.actions[-1]: len(s.actions)
            for s in e.steps
            if s.actions and not math.isnan(r.signals["process"].values[s.number])
        }
        if baseline == "horizon":
            behind = [sum(sum(gains[k]) for k in others) / (len(others) * limit)] * len(e.actions)
        elif baseline == "step":
            b = mean([totals[k] / max(counts[k], 1) for k in others])
            behind = discounted([b if a in scored_ends else 0.0 for a in e.actions], gamma)
        else:
            b = sum(totals[k] for k in others) / max(1, sum(len(every[k].actions) for k in others))
            behind = discounted([b * scored_ends.get(a, 0) for a in e.actions], gamma)
        put(table, e.actions, [u + g - b for g, b in zip(gains[i], behind, strict=True)])
    return table


def discounted(rewards: list[float], gamma: float) -> list[float]:
    out = [0.0] * len(rewards)
    after = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        after = out[t] = rewards[t] + gamma * after
    return out


def tempo(r: Rollouts, scale: str | None = "std", eps: float = 1e-6) -> list[list[float]]:
    every = episodes(r)
    words = [[int(r.tokens[a]) for a in e.actions] for e in every]
    table = blank(r)
    for i, e in enumerate(every):
        mates = [k for k, x in enumerate(every) if x.group == e.group and not math.isnan(x.outcome)]
        rewards = [every[k].outcome for k in mates]
        if math.isnan(e.outcome) or len(set(rewards)) < 2:
            continue

        def value(t: int, mates: list[int] = mates, i: int = i) -> float:
            return mean([every[k].outcome for k in mates if len(words[k]) >= t and words[k][:t] == words[i][:t]])

        divisor = deviation(rewards) + eps if scale else 1.0
        put(
            table,
            e.actions,
            [(e.outcome - mean(rewards) + value(t + 1) - value(t)) / divisor for t in range(len(e.actions))],
        )
    return table


def gae(
    r: Rollouts, gamma: float = 1.0, lam: float = 0.95, over: str = "token", kl_coef: float = 0.0
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns."""
    table, returns = blank(r), blank(r)
    for e in episodes(r, over if over != "token" else "step"):
        if math.isnan(e.outcome) or not e.actions:
            continue
        reward = {a: -kl_coef * float(r.old_logprobs[a] - r.ref_logprobs[a]) for a in e.actions}
        reward[e.actions[-1]] += e.outcome
        decisions = [[a] for a in e.actions] if over == "token" else [s.actions for s in e.steps if s.actions]
        if not decisions:
            continue
        starts = [e.actions.index(d[0]) for d in decisions]
        gathered = [0.0] * len(decisions)
        for t, a in enumerate(e.actions):
            begun = [k for k, s in enumerate(starts) if s <= t]
            gathered[begun[-1] if begun else 0] += reward[a]
        values = [float(r.values[d[0]]) for d in decisions]
        last = e.rows[-1]
        values.append(float(r.bootstrap[last]) if r.truncated[last] else 0.0)
        advantage = 0.0
        for k in range(len(decisions) - 1, -1, -1):
            advantage = gathered[k] + gamma * values[k + 1] - values[k] + gamma * lam * advantage
            put(table, decisions[k], [advantage] * len(decisions[k]))
            put(returns, decisions[k], [advantage + values[k]] * len(decisions[k]))
    return table, returns


def table_of(credit_table: list[list[float]], r: Rollouts) -> torch.Tensor:
    return torch.tensor(credit_table, dtype=torch.float64).reshape(r.batch, r.width)
