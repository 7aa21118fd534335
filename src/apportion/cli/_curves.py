"""Learning curves of recorded runs: grouped by what was run, averaged over seeds, with bootstrap intervals."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apportion.cli._compose import short
from apportion.record import Run

Array = np.ndarray[Any, np.dtype[np.float64]]
_RESAMPLES = 10_000
SLACK = 0.05
"""How far a run's last evaluation may lie beyond the common budget: responses of equal steps differ a little in length."""
_GRID = 200
_ALSO = ("greedy", "length", "truncated", "entropy")
_NOT_THE_METHOD = {
    *("seed", "steps", "out", "progress", "track", "save_every", "save_model", "keep_best"),
    *("patience", "collapse_reward", "collapse_entropy", "collapse_length"),
    *("tool_seconds", "reward_seconds"),
    *("threads", "micro_tokens", "sample_rows", "activation_checkpointing"),
}
"""Options in which runs of one group may differ: they change when it ends, what is kept, and numbers by rounding."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed and how long they went on."""

    label: str
    credit: str
    runs: list[Run]


@dataclass(frozen=True)
class Curve:
    """Mean over seeds against sampled tokens; `low` and `high` are a 95 % interval, None for a single seed."""

    tokens: Array
    mean: Array
    low: Array | None
    high: Array | None


def group_runs(paths: list[Path]) -> list[Group]:
    """The runs by credit and configuration other than the seed and the number of steps, in order of appearance."""
    by_key: dict[str, list[Run]] = {}
    for path in paths:
        run = Run(path)
        by_key.setdefault(str((run.info.get("credit"), sorted(_config(run).items(), key=str))), []).append(run)
    groups = list(by_key.values())
    labels = _labels([runs[0] for runs in groups])
    return [Group(label, str(runs[0].info.get("credit")), runs) for label, runs in zip(labels, groups, strict=True)]


def _config(run: Run) -> dict[str, Any]:
    config = run.info.get("config") or {}
    return {k: v for k, v in config.items() if k not in _NOT_THE_METHOD}


def _labels(firsts: list[Run]) -> list[str]:
    """The credit; where two groups share it, also the settings in which the groups differ."""
    credits = [short(str(run.info.get("credit"))) for run in firsts]
    keys = sorted({k for run in firsts for k in _config(run)} - {"credit"})
    differ = [k for k in keys if len({str(_config(run).get(k)) for run in firsts}) > 1]
    return [
        " ".join([credit, *(f"{k}={_config(run).get(k)}" for k in differ)]) if credits.count(credit) > 1 else credit
        for credit, run in zip(credits, firsts, strict=True)
    ]


# ---- curves -----------------------------------------------------------------------------------------------------------


def points(run: Run, kind: str, name: str) -> tuple[Array, Array]:
    """Sampled tokens and a number, from the metrics lines that hold both."""
    lines = [m for m in run.metrics(kind) if m.get(name) is not None and m.get("tokens") is not None]
    return np.array([m["tokens"] for m in lines], dtype=float), np.array([m[name] for m in lines], dtype=float)


def curve(runs: list[Run], kind: str, name: str) -> Curve | None:
    """The mean over seeds on the stretch of tokens that all of them cover; None where there is nothing to draw."""
    each = [points(run, kind, name) for run in runs]
    if any(len(tokens) == 0 for tokens, _ in each):
        return None
    if len(each) == 1:
        return Curve(*each[0], None, None)
    start, stop = max(tokens[0] for tokens, _ in each), min(tokens[-1] for tokens, _ in each)
    if stop < start:
        return None
    grid = np.linspace(start, stop, _GRID)
    seeds = np.stack([np.interp(grid, tokens, values) for tokens, values in each])
    means = _weights(len(seeds), np.random.default_rng(0)) @ seeds
    return Curve(grid, seeds.mean(0), np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0))


# ---- before and after -------------------------------------------------------------------------------------------------


def budget(groups: list[Group]) -> float | None:
    """The sampled tokens that every run has reached; runs evaluated less than twice have no after and do not count."""
    evaluated = [points(run, "eval", "accuracy")[0] for group in groups for run in group.runs]
    return min((float(tokens[-1]) for tokens in evaluated if len(tokens) > 1), default=None)


def before_after(group: Group, tokens: float) -> dict[str, Any]:
    """Accuracy at the first evaluation and at the last one within the budget, and their paired difference.

    The interval resamples held-out problems, and seeds where there are several; None where the evaluations do not say
    which problems were answered. `also` holds [before, after] of the other numbers of the evaluations.
    """
    pairs = [pair for run in group.runs if (pair := _first_and_last(run, tokens))]
    if not pairs:
        nothing = dict.fromkeys(("before", "after", "difference", "interval", "tokens", "problems"))
        return {**nothing, "also": {}}
    before = float(np.mean([first["accuracy"] for first, _ in pairs]))
    after = float(np.mean([last["accuracy"] for _, last in pairs]))
    changes = _changes(pairs)
    return {
        "before": before,
        "after": after,
        "difference": after - before,
        "interval": None if changes is None else paired_interval(changes),
        "tokens": float(np.mean([last["tokens"] for _, last in pairs])),
        "problems": pairs[0][1].get("n"),
        "also": _also(pairs),
    }


def _also(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Whatever else every evaluation measured, before and after: the mean over seeds."""
    first = pairs[0][0]
    names = [name for name in first if name in _ALSO or name.startswith(("pass@", "majority@"))]
    lines = [line for pair in pairs for line in pair]
    return {
        name: (float(np.mean([a[name] for a, _ in pairs])), float(np.mean([b[name] for _, b in pairs])))
        for name in names
        if all(line.get(name) is not None for line in lines)
    }


def stopped(run: Run) -> dict[str, Any] | None:
    """The step and the reason if a run ended before its last step, and has not gone on since."""
    stops, steps = run.metrics("stop"), run.metrics("train")
    if not stops or (steps and steps[-1]["step"] > stops[-1]["step"]):
        return None
    return {"run": str(run.path), "step": stops[-1]["step"], "reason": stops[-1].get("reason")}


def paired_interval(changes: Array) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `changes` [seeds, problems], resampling both."""
    rng = np.random.default_rng(0)
    seeds, problems = (_weights(n, rng) for n in changes.shape)
    means = ((seeds @ changes) * problems).sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _weights(n: int, rng: np.random.Generator) -> Array:
    """Bootstrap weights [resamples, n]: how often each of n is drawn in n draws, over n."""
    weights: Array = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    return weights


def _first_and_last(run: Run, tokens: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
    lines = [m for m in run.metrics("eval") if m.get("accuracy") is not None and m.get("tokens") is not None]
    within = [m for m in lines if m["tokens"] <= (1 + SLACK) * tokens]
    return (within[0], within[-1]) if len(within) > 1 else None


def _changes(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Array | None:
    lists = [[m.get("correct") or [] for m in pair] for pair in pairs]
    sizes = {len(x) for pair in lists for x in pair}
    if len(sizes) != 1 or sizes == {0}:
        return None
    before, after = np.array(lists, dtype=np.float64).swapaxes(0, 1)
    changes: Array = after - before
    return changes
