"""What a claim of a paper is here, and how intervals decide about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apportion.arena._measures import Estimate

Verdict = Literal["shown", "not shown", "contradicted"]


@dataclass(frozen=True)
class Claim:
    """What became of one claim.

    Args:
        method: whose claim it is, by its name here.
        source: the paper.
        says: the claim in one plain sentence.
        verdict: "shown", "not shown" or "contradicted".
        numbers: what was measured, what decided first.
        because: why the numbers mean that, in one sentence.
    """

    method: str
    source: str
    says: str
    verdict: Verdict
    numbers: Mapping[str, Estimate]
    because: str


def decide(*numbers: Estimate) -> Verdict:
    """All numbers should be above 0: shown if all intervals are, contradicted if one lies below, else not shown.

    >>> decide(Estimate(0.3, 0.1, 0.5)), decide(Estimate(0.3, -0.1, 0.5)), decide(Estimate(-0.3, -0.5, -0.1))
    ('shown', 'not shown', 'contradicted')
    """
    if any(x.high < 0 for x in numbers):
        return "contradicted"
    return "shown" if all(x.low > 0 for x in numbers) else "not shown"


def mean_of(values: Sequence[float] | Tensor, resamples: int = 2000) -> Estimate:
    """Mean of independent values (of seeds, of groups) with its 95 % bootstrap interval; NaN are left out.

    For a comparison give the differences of pairs.

    >>> mean_of([1.0, 1.0, 1.0])
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    x = x[~x.isnan()]
    if len(x) < 2:
        raise ValueError(f"an interval needs at least two values; got {len(x)}. Use more seeds or groups.")
    generator = torch.Generator().manual_seed(0)
    means = x[torch.randint(len(x), (resamples, len(x)), generator=generator)].mean(1)
    low, high = torch.quantile(means, means.new_tensor([0.025, 0.975])).tolist()
    return Estimate(float(x.mean()), low, high)
