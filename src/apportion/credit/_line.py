"""The action positions of a batch laid out in one line, trajectory after trajectory, in the order of time."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from apportion.functional import segment_max
from apportion.types import Rollouts


@dataclass(frozen=True)
class Line:
    """`M` action positions: rows of a trajectory follow each other by `row_index`, whatever their order in the batch.

    Args:
        positions: where each lies in the flattened [B * T], [M].
        trajectories: the trajectory of each, [M].
        shape: (B, T).
    """

    positions: Int[Tensor, " M"]
    trajectories: Int[Tensor, " M"]
    shape: tuple[int, int]

    @property
    def goes_on(self) -> Bool[Tensor, " M"]:
        """Whether another action of the same trajectory follows."""
        more = torch.zeros_like(self.trajectories, dtype=torch.bool)
        more[:-1] = self.trajectories[1:] == self.trajectories[:-1]
        return more

    def take(self, values: Float[Tensor, "B T"]) -> Float[Tensor, " M"]:
        """The values at the action positions, in float64."""
        return values.reshape(-1)[self.positions].double()

    def put(self, values: Shaped[Tensor, " M"]) -> Shaped[Tensor, "B T"]:
        """The values back at their positions; 0 elsewhere."""
        out = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype, device=values.device)
        out[self.positions] = values
        return out.view(self.shape)

    def places(self) -> Int[Tensor, "B T"]:
        """Where each position stands in the line; -1 where it is no action."""
        out = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.int64, device=self.positions.device)
        out[self.positions] = torch.arange(len(self.positions), device=out.device)
        return out.view(self.shape)

    def last_of(self, ids: Int[Tensor, " M"], units: int) -> Int[Tensor, " U"]:
        """The place in the line of the last action of each unit; -1 where a unit has none."""
        place = torch.arange(len(ids), dtype=torch.float64, device=ids.device)
        return segment_max(place, ids, units).clamp(min=-1).long()


def action_line(rollouts: Rollouts) -> Line:
    """Lay out the action positions of all trajectories."""
    by_place = torch.argsort(rollouts.row_index, stable=True)
    rows = by_place[torch.argsort(rollouts.trajectory_ids[by_place], stable=True)]
    row, position = rollouts.action_mask[rows].nonzero(as_tuple=True)
    row = rows[row]
    shape = (rollouts.batch, rollouts.width)
    return Line(row * rollouts.width + position, rollouts.trajectory_ids[row], shape)
