"""Rewards of steps whose return stays bounded, however many steps there are (Clip and Delta)."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

BoundedForm = Literal["raw", "clip", "delta", "clip_delta"]


def bounded_rewards(
    scores: Float[Tensor, " S"],
    ids: Int[Tensor, " S"],
    index: Int[Tensor, " S"],
    *,
    form: BoundedForm = "clip_delta",
    eta: float | Float[Tensor, " S"] = 0.5,
) -> Float[Tensor, " S"]:
    """The reward of each step, from the scores of the steps of its sequence, in float64.

    raw `r_k`; clip `min(r_k - eta, 0)`; delta `r_k - r_(k+1)` with r_K taken as 0, and 0 for the last step K itself, so
    that the rewards from step k on add up to r_k; clip_delta is the delta of the clipped scores.

    Steps with a NaN score or a negative id are left out before neighbours are found; their reward is 0.

    Args:
        scores: one per step, in any order.
        ids: the sequence each step belongs to.
        index: place of the step in its sequence; any increasing numbers.
        eta: what a score must reach to cost nothing; only the clipped forms read it.

    Example:
        >>> r = torch.tensor([0.9, 0.6, 0.8, 0.7], dtype=torch.float64)
        >>> bounded_rewards(r, torch.zeros(4, dtype=torch.int64), torch.arange(4), form="delta")
        tensor([ 0.3000, -0.2000,  0.8000,  0.0000], dtype=torch.float64)
    """
    kept = ~scores.isnan() & (ids >= 0)
    value = scores.double()
    if form in ("clip", "clip_delta"):
        value = (value - eta).clamp(max=0.0)
    value = torch.where(kept, value, 0.0)
    if form in ("raw", "clip"):
        return value
    which = kept.nonzero()[:, 0]
    order = which[torch.argsort(index[which], stable=True)]
    order = order[torch.argsort(ids[order], stable=True)]
    goes_on = torch.zeros_like(order, dtype=torch.bool)
    goes_on[:-1] = ids[order][1:] == ids[order][:-1]
    mine = torch.where(goes_on, value[order], 0.0)
    out = torch.zeros_like(value)
    out[order] = mine - torch.where(goes_on, mine.roll(-1), 0.0)
    return out
