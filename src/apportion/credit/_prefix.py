"""Credit from shared beginnings: the group's responses read as a tree (TEMPO)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, alias, assemble, estimator, measured_mask, trajectory_values
from apportion.credit._line import Line, action_line
from apportion.functional import (
    EpsInside,
    at_members,
    group_statistics,
    longest_shared,
    prefix_values,
    shrinks,
)
from apportion.types import Credit, Rollouts, Signal


@estimator(requires=("signals.{reward}", "tokens"), scope="group", needs_group_of=2, laws=("shift", "equal"))
def prefix_td(
    rollouts: Rollouts,
    *,
    scale: Literal["std"] | None = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    eps_inside: EpsInside = "std",
    reward: str = "outcome",
) -> Credit:
    """The group-relative advantage plus the change of value at each token where the group's responses part.

    `A_t = (r - mean + V(o_1..t) - V(o_1..t-1)) / (std + eps)`, V(p) = mean reward of the responses that begin with p.

    Source: TEMPO, arXiv 2509.18314, and its code. Departs: padding never matches; a group of one gets 0.
    Reads: signals[reward], tokens. Scope: group. Unit: trajectory, plus token for the branch part.
    Cost: none beyond the rollouts.
    Laws: the changes of value along a response add up to V(response) - mean; a shift of all rewards changes nothing.
    Degenerate: equal rewards 0; equal responses share every node; a response that ended leaves the sharers; an unmeasured
        trajectory is nobody's sharer, advantage 0, mask False.

    Only action tokens are compared, in the order of time: tool output between them is not, so responses that
    differ in it alone share their beginning.

    Args:
        rollouts: the batch.
        scale: divide by the deviation of the group's rewards, or not (None).
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        eps_inside: "std" for `std + eps`, "var" for `sqrt(var + eps)`.
        reward: signal with one reward per trajectory.

    Example:
        >>> r = Rollouts.from_lists([[1, 2], [1, 3]], [0, 0], outcome=[1.0, 0.0])
        >>> prefix_td(r, scale=None).advantages
        tensor([[ 0.5000,  1.0000],
                [-0.5000, -1.0000]])
    """
    value = trajectory_values(rollouts, reward, "prefix_td")
    stats = group_statistics(value, rollouts.trajectory_groups, rollouts.num_groups)
    divisor = stats.spread(ddof, eps, eps_inside) if scale else torch.ones_like(stats.low)
    divisor = torch.where(stats.count < 2, torch.inf, divisor)
    line = action_line(rollouts)
    change, notes = _value_changes(rollouts, line, torch.where(stats.measured, stats.y, torch.nan), divisor)
    above = (stats.y - at_members(stats.mean, stats.ids)) / at_members(divisor, rollouts.trajectory_groups)
    parts = {
        reward: Signal(torch.where(stats.measured, above, 0.0), "trajectory"),
        "branch": Signal(change, "token"),
    }
    notes["singleton_groups"] = float((stats.count == 1).sum())
    return assemble(rollouts, measured_mask(rollouts, stats.measured), parts, notes=notes)


def _value_changes(rollouts: Rollouts, line: Line, rewards: Tensor, divisor: Tensor) -> tuple[Tensor, dict[str, float]]:
    """`(V(o_1..t) - V(o_1..t-1)) / divisor` at each action, [B, T]; and the share of branches and of changes."""
    out = torch.zeros(rollouts.action_mask.shape, dtype=torch.float64, device=rollouts.device)
    if not len(line.positions):
        return out, {"branch_tokens": 0.0, "changed_tokens": 0.0}
    lengths = line.lengths(rollouts.num_trajectories)
    places, sequences = _parted(rollouts, line, lengths)
    reach = lengths.clamp(max=sequences.shape[1])
    values, sharers = prefix_values(sequences, reach, rollouts.trajectory_groups, rewards)
    inside = torch.arange(sequences.shape[1], device=rollouts.device) < reach[:, None]
    inside &= ~rewards.isnan()[:, None]
    change = torch.where(inside, values[:, 1:] - values[:, :-1], 0.0) / divisor[rollouts.trajectory_groups][:, None]
    out.view(-1)[places[inside]] = change[inside]
    branch, actions = shrinks(sharers, reach) & inside, len(line.positions)
    notes = {"branch_tokens": int(branch.sum()) / actions, "changed_tokens": int((change != 0).sum()) / actions}
    return out, notes


def _parted(rollouts: Rollouts, line: Line, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The first actions of each trajectory, so many that no two of a group are alike beyond: positions and tokens, [N, W]."""
    assert rollouts.tokens is not None
    tokens, first, longest = rollouts.tokens.reshape(-1), lengths.cumsum(0) - lengths, int(lengths.max())
    width = min(64, longest)
    while True:
        place = torch.arange(width, device=rollouts.device)
        inside = place < lengths[:, None]
        places = line.positions[torch.where(inside, first[:, None] + place, 0)]
        sequences = torch.where(inside, tokens[places], 0)
        if width == longest or longest_shared(sequences, lengths.clamp(max=width), rollouts.trajectory_groups) < width:
            return places, sequences
        width = min(2 * width, longest)


@alias
def tempo(*, scale: Literal["std"] | None = "std", eps: float = 1e-6, reward: str = "outcome") -> Estimator:
    """TEMPO: group-relative credit plus the change of value where responses part.

    Source: arXiv 2509.18314. `scale=None` is its mean-only variant.
    Cost: none beyond the rollouts.

    Example:
        >>> tempo()
        prefix_td(scale='std', eps=1e-06, reward='outcome')
    """
    return prefix_td(scale=scale, eps=eps, reward=reward)
