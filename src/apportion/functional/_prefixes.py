"""Values of shared prefixes: sequences are sorted and compared, never hashed."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.functional._segments import segment_sum


def prefix_values(
    tokens: Int[Tensor, "N L"],
    lengths: Int[Tensor, " N"],
    groups: Int[Tensor, " N"],
    rewards: Float[Tensor, " N"],
) -> tuple[Float[Tensor, "N L1"], Float[Tensor, "N L1"]]:
    """Mean reward of the sequences of the same group that begin with the same t tokens, t = 0..L.

    `V[i, t] = mean of rewards[k] over k in sharers(i, t)`, where sharers have length >= t and the same first t tokens.
    Padding matches nothing. Sequences with a NaN reward are nobody's sharers; every V is in float64.

    Returns:
        values: [N, L + 1], column t for the prefix of t tokens; 0 beyond the sequence's length.
        sharers: how many sequences have that prefix, [N, L + 1]; 0 beyond the length.

    Example:
        >>> V, n = prefix_values(torch.tensor([[1, 2], [1, 3]]), torch.tensor([2, 2]), torch.tensor([0, 0]),
        ...                      torch.tensor([1.0, 0.0]))
        >>> V
        tensor([[0.5000, 0.5000, 1.0000],
                [0.5000, 0.5000, 0.0000]], dtype=torch.float64)
    """
    rows, width = tokens.shape
    place = torch.arange(width + 1, device=tokens.device)
    if not rows:
        empty = torch.zeros(0, width + 1, dtype=torch.float64, device=tokens.device)
        return empty, empty
    order, shared = _sorted_with_overlap(tokens, lengths, groups)
    run = (shared[:, None] < place).cumsum(0)
    ids = torch.where(place <= lengths[order, None], run * (width + 1) + place, -1).flatten()
    reward = rewards.double()[order]
    measured = ~reward.isnan()
    size = (rows + 1) * (width + 1)

    def shared_sum(x: Tensor) -> Tensor:
        return segment_sum(x[:, None].expand(rows, width + 1).flatten(), ids, size)

    total, count = shared_sum(torch.where(measured, reward, 0.0)), shared_sum(measured.double())
    back = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    inside = ids >= 0
    value = torch.where(inside, (total / count.clamp(min=1))[ids], 0.0).view(rows, -1)
    return value[back], torch.where(inside, count[ids], 0.0).view(rows, -1)[back]


def longest_shared(tokens: Int[Tensor, "N L"], lengths: Int[Tensor, " N"], groups: Int[Tensor, " N"]) -> int:
    """The most tokens that two sequences of one group begin with in common.

    Example:
        >>> longest_shared(torch.tensor([[1, 2, 3], [1, 2, 4]]), torch.tensor([3, 3]), torch.tensor([0, 0]))
        2
    """
    return int(_sorted_with_overlap(tokens, lengths, groups)[1].max()) if len(tokens) > 1 else 0


def _sorted_with_overlap(tokens: Tensor, lengths: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Lexicographic order of (group, tokens), and for each how many tokens it shares with the one before, -1 = none."""
    width = tokens.shape[1]
    inside = torch.arange(width, device=tokens.device) < lengths[:, None]
    lowest = torch.where(inside, tokens, 0).min() if tokens.numel() else 0
    keys = torch.cat([groups[:, None], torch.where(inside, tokens - lowest + 1, 0)], 1)
    rank = torch.unique(keys, dim=0, return_inverse=True)[1]
    order = torch.argsort(rank, stable=True)
    ordered = keys[order]
    same = (ordered[1:] == ordered[:-1]).to(torch.int8).cumprod(1).sum(1) - 1
    same = torch.minimum(same, torch.minimum(lengths[order][1:], lengths[order][:-1]))
    return order, torch.cat([same.new_full((1,), -1), same])


def shrinks(sharers: Float[Tensor, "N L1"], lengths: Int[Tensor, " N"]) -> Bool[Tensor, "N L"]:
    """Branch positions: fewer sequences share the prefix after the token than before it."""
    inside = torch.arange(sharers.shape[1] - 1, device=sharers.device) < lengths[:, None]
    return inside & (sharers[:, 1:] < sharers[:, :-1])
