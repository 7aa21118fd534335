"""Which problems a step uses and which random numbers it samples with: functions of seed and step, nothing else."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch

from apportion.tasks import Problem

LEARNING = 1 << 20
"""The `turn` of `generator_for` that shuffles mini-batches; smaller ones are rounds of sampling."""


def draw(problems: Sequence[Problem], count: int, seed: int, start: int, *, stream: int = 0) -> list[Problem]:
    """The next `count` problems after `start`: epochs of a shuffled list, so that none repeats before all were seen.

    Each stream walks its own shuffles: 0 is the training's, 1 the warm-up's.
    """
    size = len(problems)
    return [problems[_shuffle(size, seed, stream, i // size)[i % size]] for i in range(start, start + count)]


def check_schedule(problems: Sequence[Problem], count: int) -> None:
    """Refuse a task with fewer problems than one step uses: a prompt would be two groups of one step."""
    if len(problems) < count:
        raise ValueError(
            f"a step needs {count} different problems, but the task has {len(problems)} to train on. "
            f"Lower prompts_per_step, or give more problems."
        )


def generator_for(seed: int, step: int, turn: int = 0) -> torch.Generator:
    """The random numbers of one step, on the CPU (step 0: evaluation); `turn` tells several uses in a step apart."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + turn * 7_368_787_903) % 2**63)


def rate(
    step: int, total: int, *, ramp: int, schedule: Literal["constant", "linear", "cosine"], final: float = 0.0
) -> float:
    """Share of the peak learning rate at `step` of 1 .. `total`: a linear ramp, then constant or falling to `final`.

        step / ramp                                    up to step = ramp, where it is 1
        1 - (1 - final) p                              linear, p = (step - ramp) / (total - ramp)
        final + (1 - final) (1 + cos(pi p)) / 2        cosine

    Laws: 1 at the end of the ramp, `final` at the last step.
    Degenerate: without a ramp the first step is at the peak; a run that ends within its ramp does not fall.

    Example:
        >>> [rate(s, 6, ramp=2, schedule="linear", final=0.5) for s in (1, 2, 4, 6)]
        [0.5, 1.0, 0.75, 0.5]
    """
    top = max(ramp, 1)
    if step <= top:
        return step / top
    if schedule == "constant":
        return 1.0
    done = min((step - top) / max(total - top, 1), 1.0)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * left


@lru_cache(maxsize=8)
def _shuffle(size: int, seed: int, stream: int, epoch: int) -> list[int]:
    seeded = torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 2 + stream) % 2**63)
    order: list[int] = torch.randperm(size, generator=seeded).tolist()
    return order
