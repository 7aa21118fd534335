"""Group statistics, every convention by name; equal members give exactly 0."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.functional._segments import at_members, segment_count, segment_max, segment_min, segment_sum

EpsInside = Literal["std", "var"]
_EQUAL = 2.0**-40


@dataclass(frozen=True)
class GroupStatistics:
    """What is known of each group of members, in float64.

    Members are compared through `y = x - low`, and a group whose members are equal up to rounding
    (`max - min <= 2^-40 max|x|`) has `y = 0` exactly, so no rounding noise can be divided by a tiny deviation.

    Args:
        y: members above the smallest of their group; 0 for unmeasured ones, [M].
        measured: members that are a number and in a group, [M].
        ids: the group of each member, [M].
        count: measured members, [G]. low: smallest measured member, 0 where there is none, [G].
        total: sum of y, [G]. squares: sum of (y - mean y)^2, [G]. flat: no signal, all members equal, [G].
    """

    y: Float[Tensor, " M"]
    measured: Bool[Tensor, " M"]
    ids: Int[Tensor, " M"]
    count: Float[Tensor, " G"]
    low: Float[Tensor, " G"]
    total: Float[Tensor, " G"]
    squares: Float[Tensor, " G"]
    flat: Bool[Tensor, " G"]

    @property
    def mean(self) -> Float[Tensor, " G"]:
        """Mean of y, [G]; the mean of the members is `low + mean`."""
        return self.total / self.count.clamp(min=1)

    def spread(self, ddof: int, eps: float, eps_inside: EpsInside) -> Float[Tensor, " G"]:
        """Each group's divisor: `std + eps`, or `sqrt(var + eps)`; +inf where all members are equal."""
        variance = self.squares / (self.count - ddof).clamp(min=1)
        return _divisor(variance, eps, eps_inside, self.flat)

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
    return GroupStatistics(y, measured, ids, count, low, total, squares, flat)


def masked_whiten(
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_inside: EpsInside = "var",
) -> Float[Tensor, "B T"]:
    """Zero mean and unit variance over the masked positions; 0 elsewhere, and 0 everywhere if they are all equal.

    `(x - mean) / sqrt(var + eps)`, or `/ (std + eps)` for `eps_inside="std"`, in float64, returned in the input's dtype.

    Example:
        >>> masked_whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]), ddof=0, eps=0.0)
        tensor([[-1.,  1.,  0.]])
    """
    ids = torch.where(mask, 0, -1).flatten()
    s = group_statistics(values.flatten(), ids, 1)
    white = torch.where(s.measured, (s.y - s.mean) / s.spread(ddof, eps, eps_inside), 0.0)
    return white.view(values.shape).to(values.dtype)


def _divisor(variance: Tensor, eps: float, eps_inside: EpsInside, flat: Tensor) -> Tensor:
    divisor = (variance + eps).sqrt() if eps_inside == "var" else variance.sqrt() + eps
    return torch.where(flat, torch.inf, divisor)
