"""Group statistics, every convention by name; equal members give exactly 0."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.functional._segments import at_members, segment_count, segment_max, segment_min, segment_sum

EpsInside = Literal["std", "var", "floor"]
_EQUAL = 2.0**-40


@dataclass(frozen=True)
class Moments:
    """Mean and spread of each group, in float64; a group whose members are equal up to rounding is flat.

    Args:
        count: measured members, [G]. low: smallest measured member, 0 where there is none, [G].
        total: sum of what the members are above `low`, [G]. squares: sum of squared deviations from the mean, [G].
        flat: no signal: `max - min <= 2^-40 max|x|`, [G].
    """

    count: Float[Tensor, " G"]
    low: Float[Tensor, " G"]
    total: Float[Tensor, " G"]
    squares: Float[Tensor, " G"]
    flat: Bool[Tensor, " G"]

    @property
    def mean(self) -> Float[Tensor, " G"]:
        """Mean of what the members are above `low`, [G]; the mean of the members is `low + mean`."""
        return self.total / self.count.clamp(min=1)

    def spread(self, ddof: int, eps: float, eps_inside: EpsInside) -> Float[Tensor, " G"]:
        """Each group's divisor, +inf where all members are equal.

        `std + eps` ("std"), `sqrt(var + eps)` ("var"), `sqrt(max(var, eps))` ("floor").
        """
        variance = self.squares / (self.count - ddof).clamp(min=1)
        return _divisor(variance, eps, eps_inside, self.flat)


@dataclass(frozen=True)
class GroupStatistics(Moments):
    """The moments of each group, and its members compared with them.

    Members are compared through `y = x - low`, and a flat group has `y = 0` exactly, so no rounding noise can be
    divided by a tiny deviation.

    Args:
        y: members above the smallest of their group; 0 for unmeasured ones, [M].
        measured: members that are a number and in a group, [M].
        ids: the group of each member, [M].
    """

    y: Float[Tensor, " M"]
    measured: Bool[Tensor, " M"]
    ids: Int[Tensor, " M"]

    def spread_of_others(self, ddof: int, eps: float, eps_inside: EpsInside) -> Float[Tensor, " M"]:
        """The same of each member's group without the member, [M]; +inf where the others are equal or too few."""
        n = at_members(self.count, self.ids)
        deviation = self.y - at_members(self.mean, self.ids)
        squares = at_members(self.squares, self.ids) - deviation.square() * n / (n - 1).clamp(min=1)
        variance = squares.clamp(min=0) / (n - 1 - ddof).clamp(min=1)
        noise = _EQUAL * at_members(self.squares, self.ids)
        return _divisor(variance, eps, eps_inside, (squares <= noise) | (n - 1 <= ddof))


def group_statistics(values: Float[Tensor, " M"], ids: Int[Tensor, " M"], groups: int) -> GroupStatistics:
    """Statistics of the measured members of each group: NaN members and members with a negative id stay out.

    Example:
        >>> s = group_statistics(torch.tensor([0.99] * 12), torch.zeros(12, dtype=torch.int64), 1)
        >>> s.y.abs().max(), s.flat
        (tensor(0., dtype=torch.float64), tensor([True]))
    """
    x = values.double()
    measured = ~x.isnan() & (ids >= 0)
    ids = torch.where(measured, ids, -1)
    count = segment_count(ids, groups)
    low, high = segment_min(x, ids, groups), segment_max(x, ids, groups)
    flat = (high - low <= _EQUAL * torch.maximum(high.abs(), low.abs())) | (count == 0)
    low = torch.where(count > 0, low, 0.0)
    signal = measured & ~at_members(flat.double(), ids).bool()
    y = torch.where(signal, x - at_members(low, ids), 0.0)
    total = segment_sum(y, ids, groups)
    deviation = torch.where(signal, y - at_members(total / count.clamp(min=1), ids), 0.0)
    squares = segment_sum(deviation.square(), ids, groups)
    return GroupStatistics(count, low, total, squares, flat, y, measured, ids)


def row_moments(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], ids: Int[Tensor, " B"], groups: int
) -> Moments:
    """Moments over the masked positions of the rows of each group: row by row first, for speed.

    `values` are finite, and 0 outside the mask.

    Example:
        >>> m = row_moments(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, True, False]]), torch.tensor([0]), 1)
        >>> m.low + m.mean, m.spread(ddof=0, eps=0.0, eps_inside="std")
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    x, size = values.double(), mask.sum(1)
    ids = torch.where(size > 0, ids, -1)
    inside = torch.where(mask, x, x.gather(1, mask.byte().argmax(1, keepdim=True))) if x.numel() else x
    count = segment_sum(size.double(), ids, groups)
    low, high = torch.full((2, groups), torch.inf, dtype=torch.float64, device=x.device).unbind()
    if x.numel():
        low, high = segment_min(inside.amin(1), ids, groups), segment_max(inside.amax(1), ids, groups)
    flat = (high - low <= _EQUAL * torch.maximum(high.abs(), low.abs())) | (count == 0)
    low = torch.where(count > 0, low, 0.0)
    mean = segment_sum(x.sum(1), ids, groups) / count.clamp(min=1)
    deviation = torch.where(mask, x - at_members(mean, ids)[:, None], 0.0)
    squares = segment_sum(deviation.square_().sum(1), ids, groups)
    return Moments(count, low, torch.where(flat, 0.0, mean - low) * count, squares, flat)


def _divisor(variance: Tensor, eps: float, eps_inside: EpsInside, flat: Tensor) -> Tensor:
    if eps_inside == "std":
        divisor = variance.sqrt() + eps
    else:
        divisor = (variance + eps if eps_inside == "var" else variance.clamp(min=eps)).sqrt()
    return torch.where(flat, torch.inf, divisor)
