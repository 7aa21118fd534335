"""The spans of a batch in the order of time, and what methods over turns share."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.credit._base import span_values
from apportion.functional import GroupStatistics, at_members, segment_count, segment_sum, suffix_sum
from apportion.types import Rollouts


@dataclass(frozen=True)
class Timeline:
    """The spans of one set, trajectory after trajectory, in the order of time.

    Args:
        order: which span stands at each place, [S].
        owner: the trajectory of the span at each place, [S].
    """

    order: Int[Tensor, " S"]
    owner: Int[Tensor, " S"]

    @property
    def goes_on(self) -> Bool[Tensor, " S"]:
        """Whether another span of the same trajectory follows."""
        more = torch.zeros_like(self.owner, dtype=torch.bool)
        more[:-1] = self.owner[1:] == self.owner[:-1]
        return more

    def back(self, values: Tensor) -> Tensor:
        """Values in the order of time, each at its own span again."""
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def returns(self, rewards: Float[Tensor, " S"], gamma: float) -> Float[Tensor, " S"]:
        """Discounted sum of the rewards of each span and of the later ones of its trajectory."""
        return self.back(suffix_sum(rewards[self.order], gamma * self.goes_on.double()))


def timeline(rollouts: Rollouts, spans: str) -> Timeline:
    """Order the spans by trajectory, place of the row and start; where an empty span shares its start, by `index`."""
    found = rollouts.spans[spans]
    by_place = torch.argsort(rollouts.row_index, stable=True)
    rows = by_place[torch.argsort(rollouts.trajectory_ids[by_place], stable=True)]
    rank = torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
    when = rank[found.row] * (rollouts.width + 1) + found.start
    order = torch.argsort(found.index, stable=True)
    order = order[torch.argsort(when[order], stable=True)]
    return Timeline(order, rollouts.trajectory_ids[found.row[order]])


def owners(rollouts: Rollouts, spans: str) -> Int[Tensor, " S"]:
    """The trajectory of each span."""
    return rollouts.trajectory_ids[rollouts.spans[spans].row]


def turn_rewards(
    rollouts: Rollouts, reward: str, spans: str, needed_by: str
) -> tuple[Float[Tensor, " S"], Float[Tensor, " N"], int]:
    """The reward of each turn, 0 where unmeasured; each trajectory's total, NaN where no turn was; turns unmeasured."""
    given = span_values(rollouts, reward, spans, 0, needed_by)
    known = ~given.isnan()
    ids = torch.where(known, owners(rollouts, spans), -1)
    count = segment_count(ids, rollouts.num_trajectories)
    total = segment_sum(given, ids, rollouts.num_trajectories)
    return torch.where(known, given, 0.0), torch.where(count > 0, total, torch.nan), int((~known).sum())


def above_mean(stats: GroupStatistics, scale: Literal["std"] | None, ddof: int, eps: float) -> Float[Tensor, " M"]:
    """Each member above its group's mean, over `std + eps` if wanted; 0 for unmeasured members and in flat groups."""
    above = stats.y - at_members(stats.mean, stats.ids)
    if scale:
        above = above / at_members(stats.spread(ddof, eps, "std"), stats.ids)
    return torch.where(stats.measured, above, 0.0)
