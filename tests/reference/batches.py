"""Random ragged batches: several rows a trajectory, groups of any size, gaps in the mask, unmeasured things."""

from dataclasses import replace
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
    return r.with_spans(step=Spans(*columns)).with_signals(
        judge=Signal(torch.tensor(verdicts, dtype=dtype).reshape(-1, 3), "step", ("critiques",)),
        process=Signal(torch.tensor(scores, dtype=dtype), "step"),
    )


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
    return r.replace(tokens=longer(r.tokens, 1), action_mask=longer(r.action_mask, False), **junk)


def with_outcome(r: Rollouts, values: torch.Tensor) -> Rollouts:
    return r.with_signals(outcome=replace(r.signals["outcome"], values=values))
