"""Order inside ragged rows: medians, and which entries are among the largest."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def row_median(values: Float[Tensor, "K L"], lengths: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
    """The median of the first `lengths` entries of each row; the mean of the middle two if they are two, 0 if none.

    Example:
        >>> row_median(torch.tensor([[5.0, 1.0, 2.0], [4.0, 7.0, 0.0]]), torch.tensor([3, 2]))
        tensor([2.0000, 5.5000])
    """
    if not values.numel():
        return values.new_zeros(len(lengths))
    ordered = torch.where(_inside(values, lengths), values, torch.inf).sort(dim=1).values
    last = (lengths - 1).clamp(min=0)
    middle = torch.stack([last // 2, (last + 1) // 2], 1)
    return torch.where(lengths > 0, ordered.gather(1, middle).mean(1), 0.0)


def row_top(values: Float[Tensor, "K L"], lengths: Int[Tensor, " K"], share: float) -> Bool[Tensor, "K L"]:
    """Which are the `ceil(share * n)` largest of the first n = `lengths` entries of each row; earlier ones first if
    equal.

    Example:
        >>> row_top(torch.tensor([[2.0, 1.0, 2.0, 2.0], [9.0, 0.0, 0.0, 0.0]]), torch.tensor([4, 1]), 0.5)
        tensor([[ True, False,  True, False],
                [ True, False, False, False]])
    """
    if not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    wanted = (share * lengths - 1e-9).ceil().long().clamp(min=0)[:, None]
    inside = _inside(values, lengths) & (wanted > 0)
    values = torch.where(inside, values, -torch.inf)
    ordered = values.sort(dim=1, descending=True).values
    least = ordered.gather(1, (wanted - 1).clamp(min=0))
    above, level = values > least, (values == least) & inside
    room = wanted - above.sum(1, keepdim=True)
    return above | (level & (level.cumsum(1) <= room))


def _inside(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(values.shape[1], device=values.device) < lengths[:, None]
