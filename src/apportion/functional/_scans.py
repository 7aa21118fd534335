"""Scans from the end of a line of positions, in blocks: no loop over positions, no powers of gamma."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 32


def suffix_sum(values: Float[Tensor, "*F M"], carry: Float[Tensor, " M"]) -> Float[Tensor, "*F M"]:
    """Discounted sums from each position on: `x[t] = values[t] + carry[t] x[t+1]`, in float64; several lines at once.

    A carry of 0 ends a sequence: nothing of the next one, NaN included, passes it. With `carry = gamma lam` inside
    sequences this is the GAE recursion; with 1 it is a plain return.

    Example:
        >>> suffix_sum(torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0.5, 0.5, 0.0, 0.0]))
        tensor([1.7500, 1.5000, 1.0000, 5.0000], dtype=torch.float64)
    """
    values = values.double()
    tame = bool(values.abs().amax() < 1e290) if values.numel() else True
    return _suffix_scan(values, carry.double(), _add_tame if tame else _add, 0.0)


def suffix_min(values: Float[Tensor, " M"], carry: Bool[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Smallest value from each position on: `x[t] = min(values[t], x[t+1] if carry[t])`, in float64.

    Example:
        >>> suffix_min(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, False]))
        tensor([1., 1., 2.], dtype=torch.float64)
    """
    return _suffix_scan(values.double(), carry.double(), _least, torch.inf)


def _add_tame(x: Tensor, carry: Tensor, following: Tensor) -> None:
    x.addcmul_(carry, following)


def _add(x: Tensor, carry: Tensor, following: Tensor) -> None:
    """Also where values are NaN or infinite, which no product with 0 would stop."""
    x.add_(torch.where(carry != 0, carry * following, 0.0))


def _least(x: Tensor, carry: Tensor, following: Tensor) -> None:
    torch.minimum(x, torch.where(carry != 0, following, torch.inf), out=x)


def _suffix_scan(
    values: Tensor, carry: Tensor, step: Callable[[Tensor, Tensor, Tensor], None], nothing: float
) -> Tensor:
    """Scan blocks of 32 positions side by side, then the first positions of the blocks, then pass those results on."""
    shape, length = values.shape, values.shape[-1]
    if not values.numel():
        return values
    blocks = -(-length // _BLOCK)
    fill = blocks * _BLOCK - length
    x = pad(values.reshape(-1, length), (0, fill), value=nothing).view(-1, blocks, _BLOCK).permute(2, 0, 1)
    x = x.clone(memory_format=torch.contiguous_format)
    through = pad(carry, (0, fill)).view(blocks, _BLOCK).T.clone(memory_format=torch.contiguous_format)
    for k in range(_BLOCK - 2, -1, -1):
        step(x[k], through[k], x[k + 1])
        through[k].mul_(through[k + 1])
    if blocks > 1:
        heads = _suffix_scan(x[0], through[0], step, nothing)
        step(x, through[:, None], pad(heads[:, 1:], (0, 1), value=nothing))
    return x.permute(1, 2, 0).reshape(-1, blocks * _BLOCK)[:, :length].reshape(shape)
