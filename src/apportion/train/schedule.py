"""Which problems a step uses and which random numbers it samples with: functions of seed and step, nothing else."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from apportion.tasks import Problem


def draw(problems: Sequence[Problem], count: int, seed: int, step: int) -> list[Problem]:
    """The `count` problems of a step: epochs of a shuffled list, so that none repeats before all were seen.

    Steps count from 1; negative steps (the warm-up) walk their own shuffle of the same list.
    """
    stream, start = (0, (step - 1) * count) if step > 0 else (1, (-1 - step) * count)
    places = range(start, start + count)
    size = len(problems)
    return [problems[_shuffle(size, seed, stream, i // size)[i % size]] for i in places]


def check_schedule(problems: Sequence[Problem], count: int) -> None:
    """Refuse a task with fewer problems than one step uses: a prompt would be two groups of one step."""
    if len(problems) < count:
        raise ValueError(
            f"a step needs {count} different problems, but the task has {len(problems)} to train on. "
            f"Lower prompts_per_step, or give more problems."
        )


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU (step 0: evaluation)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


@lru_cache(maxsize=8)
def _shuffle(size: int, seed: int, stream: int, epoch: int) -> list[int]:
    seeded = torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 2 + stream) % 2**63)
    order: list[int] = torch.randperm(size, generator=seeded).tolist()
    return order
