"""How far a mean over problems may be from the truth."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_RESAMPLES, _BLOCK = 10_000, 500
_Z = 1.959963984540054
"""The standard normal's 97.5 % point."""


def mean_intervals(values: Float[Tensor, "P M"]) -> Float[Tensor, "M 2"]:
    """95 % intervals, [low, high], of the mean over problems of each of M numbers; the problems are what was drawn.

    A column of nothing but 0 and 1 (one response a problem, right or wrong) gets Wilson's score interval, which stays
    honest at 0 % and 100 %:

        (p + z^2/2P -+ z sqrt(p(1-p)/P + z^2/4P^2)) / (1 + z^2/P)        z = 1.96

    Every other column gets the 2.5 % and 97.5 % points of the means of 10,000 resamples of the problems, which are the
    same every time. Responses to one problem are no independent draws, so they are never resampled apart.

    Source: Wilson 1927; Efron 1979 (percentile bootstrap).
    Degenerate: no problems give NaN; equal values other than 0 and 1 give an interval of width 0.

    Example: nothing right on ten problems.
        >>> mean_intervals(torch.zeros(10, 1))
        tensor([[0.0000, 0.2775]], dtype=torch.float64)
    """
    x = values.double()
    if not len(x):
        return x.new_full((x.shape[1], 2), torch.nan)
    out = _wilson(x.mean(0), len(x))
    graded = ((x != 0) & (x != 1)).any(0)
    if bool(graded.any()):
        out[graded] = _resampled_means(x[:, graded]).quantile(x.new_tensor([0.025, 0.975]), dim=0).T
    return out


def _wilson(p: Tensor, count: int) -> Tensor:
    half = _Z * (p * (1 - p) / count + _Z**2 / (4 * count**2)).sqrt()
    middle = p + _Z**2 / (2 * count)
    return (torch.stack([middle - half, middle + half], 1) / (1 + _Z**2 / count)).clamp(0, 1)


def _resampled_means(x: Tensor) -> Tensor:
    """The means of resamples of the rows, [resamples, M]; drawn in blocks, since all draws of many rows are large."""
    rng, rows = np.random.default_rng(0), len(x)
    blocks = (rng.multinomial(rows, np.full(rows, 1 / rows), size=_BLOCK) for _ in range(_RESAMPLES // _BLOCK))
    return torch.cat([torch.from_numpy(drawn / rows).to(x.device) @ x for drawn in blocks])
