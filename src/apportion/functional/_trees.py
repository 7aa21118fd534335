"""Sums up a tree of nodes that name their parent: a loop over depths, never over nodes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.functional._segments import at_members, segment_max, segment_sum


def tree_depth(parent: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """How many ancestors each node has; a negative parent marks a root.

    Raises:
        ValueError: the parents go round in a circle.

    Example:
        >>> tree_depth(torch.tensor([-1, 0, 0, 2, -1]))
        tensor([0, 1, 1, 2, 0])
    """
    depth, jump = (parent >= 0).long(), parent
    for _ in range(len(parent).bit_length() + 1):
        if not bool((jump >= 0).any()):
            return depth
        depth = depth + at_members(depth, jump)
        jump = torch.where(jump >= 0, jump[jump.clamp(min=0)], -1)
    raise ValueError("parents go round in a circle. Every chain of parents must end at a root, which has parent -1.")


def tree_sum(values: Float[Tensor, " S"], carry: Float[Tensor, " S"], parent: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Sums from the leaves up: `x[n] = values[n] + sum over children c of carry[c] x[c]`, in float64.

    With a carry of 1 these are sums over everything below a node, with gamma discounted ones, with weights that sum to 1
    over siblings an expectation.

    Example:
        >>> tree_sum(torch.tensor([0.0, 1.0, 4.0]), torch.full((3,), 0.5), torch.tensor([-1, 0, 1]))
        tensor([1.5000, 3.0000, 4.0000], dtype=torch.float64)
    """
    depth = tree_depth(parent)
    out, carry = values.double().clone(), carry.double()
    levels = torch.argsort(depth, stable=True).split(torch.bincount(depth).tolist())
    for nodes in levels[:0:-1]:
        out.index_add_(0, parent[nodes], carry[nodes] * out[nodes])
    return out


def tree_values(
    rewards: Float[Tensor, " S"], parent: Int[Tensor, " S"], logits: Float[Tensor, " S"] | None = None
) -> Float[Tensor, " S"]:
    """The value of each node from the rewards of the leaves below it, in float64.

    Without logits the mean of these rewards; with them `v(n) = sum over children c of softmax(logits)_c v(c)`, the softmax
    running over siblings.

    Args:
        rewards: NaN at inner nodes and at leaves that were not measured; such leaves have no say.
        parent: the parent of each node, -1 for a root.
        logits: log-probability of the edge into each node.

    Returns:
        Values; NaN at nodes without a measured leaf.

    Example:
        >>> tree_values(torch.tensor([torch.nan, 1.0, 0.0]), torch.tensor([-1, 0, 0]))
        tensor([0.5000, 1.0000, 0.0000], dtype=torch.float64)
    """
    measured = ~rewards.isnan()
    ones = torch.ones_like(rewards, dtype=torch.float64)
    leaves = tree_sum(measured.double(), ones, parent)
    weight = ones if logits is None else _softmax(logits.double(), torch.where(leaves > 0, parent, -1))
    total = tree_sum(torch.where(measured, rewards, 0.0), weight, parent)
    return torch.where(leaves > 0, total / leaves.clamp(min=1) if logits is None else total, torch.nan)


def _softmax(logits: Tensor, ids: Tensor) -> Tensor:
    """Softmax over the members of each segment; 0 at members of none."""
    weight = torch.where(ids >= 0, (logits - at_members(segment_max(logits, ids, len(ids)), ids)).exp(), 0.0)
    return torch.where(ids >= 0, weight / at_members(segment_sum(weight, ids, len(ids)), ids), 0.0)
