"""Credit from shared beginnings: the group's responses read as a tree (TEMPO)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, alias, assemble, estimator, measured_mask, trajectory_values
from apportion.credit._line import Line, action_line
from apportion.functional import EpsInside, at_members, group_statistics, prefix_values, segment_count, shrinks
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
    change, branch = _value_changes(rollouts, line, torch.where(stats.measured, stats.y, torch.nan))
    above = (stats.y - at_members(stats.mean, stats.ids)) / at_members(divisor, rollouts.trajectory_groups)
    parts = {
        reward: Signal(torch.where(stats.measured, above, 0.0), "trajectory"),
        "branch": Signal(line.put(change) / divisor[rollouts.group_ids][:, None], "token"),
    }
    notes = {
        "branch_tokens": float(branch.double().mean()) if len(branch) else 0.0,
        "changed_tokens": float((change != 0).double().mean()) if len(change) else 0.0,
        "singleton_groups": float((stats.count == 1).sum()),
    }
    return assemble(rollouts, measured_mask(rollouts, stats.measured), parts, notes=notes)


def _value_changes(rollouts: Rollouts, line: Line, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """`V(o_1..t) - V(o_1..t-1)` at each action of the line, and whether it is a branch."""
    assert rollouts.tokens is not None
    n = rollouts.num_trajectories
    lengths = segment_count(line.trajectories, n).long()
    longest = int(lengths.max()) if n else 0
    place = torch.arange(len(line.positions), device=rollouts.device) - (lengths.cumsum(0) - lengths)[line.trajectories]
    sequences = rollouts.tokens.new_zeros(n, longest)
    sequences[line.trajectories, place] = rollouts.tokens.reshape(-1)[line.positions]
    values, sharers = prefix_values(sequences, lengths, rollouts.trajectory_groups, rewards)
    change = (values[:, 1:] - values[:, :-1])[line.trajectories, place]
    measured = ~rewards.isnan()[line.trajectories]
    return torch.where(measured, change, 0.0), shrinks(sharers, lengths)[line.trajectories, place] & measured


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
