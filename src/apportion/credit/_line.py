"""The action positions of a batch laid out in one line, trajectory after trajectory, in the order of time."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from apportion.types import Rollouts


@dataclass(frozen=True)
class Line:
    """`M` action positions: rows of a trajectory follow each other by `row_index`, whatever their order in the batch.

    Args:
        positions: where each lies in the flattened [B * T], [M].
        trajectories: the trajectory of each, [M].
        shape: (B, T).
        acts: which of them are actions, [M]; None = all. Others are there only if observations were asked for.
    """

    positions: Int[Tensor, " M"]
    trajectories: Int[Tensor, " M"]
    shape: tuple[int, int]
    acts: Bool[Tensor, " M"] | None = None

    @cached_property
    def goes_on(self) -> Bool[Tensor, " M"]:
        """Whether another action of the same trajectory follows."""
        more = torch.zeros_like(self.trajectories, dtype=torch.bool)
        more[:-1] = self.trajectories[1:] == self.trajectories[:-1]
        return more

    @cached_property
    def counts(self) -> Int[Tensor, " K"]:
        """How many positions each trajectory has, up to the last one that has any."""
        return torch.bincount(self.trajectories)

    def lengths(self, trajectories: int) -> Int[Tensor, " N"]:
        """How many positions each trajectory has."""
        return pad(self.counts, (0, trajectories - len(self.counts)))

    def spread(self, values: Shaped[Tensor, " N"]) -> Shaped[Tensor, " M"]:
        """The trajectory's value at each of its positions."""
        return torch.repeat_interleave(values, self.lengths(len(values)), output_size=len(self.trajectories))

    def take(self, values: Float[Tensor, "B T"]) -> Float[Tensor, " M"]:
        """The values at the action positions, in float64."""
        return values.reshape(-1).index_select(0, self.positions).double()

    def ids(self, rollouts: Rollouts, unit: str) -> Int[Tensor, " M"]:
        """The trajectory or span that each is part of; -1 where it is in no span."""
        if unit == "trajectory":
            return self.trajectories
        return rollouts.unit_ids(unit).reshape(-1).index_select(0, self.positions)

    def of_actions(self, values: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
        """The values where they belong to an action, 0 at observations."""
        return values if self.acts is None else torch.where(self.acts, values, 0.0)

    def put(self, values: Shaped[Tensor, " M"]) -> Shaped[Tensor, "B T"]:
        """The values back at their positions; 0 elsewhere."""
        out = torch.zeros(self.shape[0] * self.shape[1], dtype=values.dtype, device=values.device)
        return out.scatter_(0, self.positions, values).view(self.shape)

    def places(self) -> Int[Tensor, "B T"]:
        """Where each position stands in the line; -1 where it is no action."""
        out = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.int64, device=self.positions.device)
        out[self.positions] = torch.arange(len(self.positions), device=out.device)
        return out.view(self.shape)

    def last_of(self, ids: Int[Tensor, " M"], units: int) -> Int[Tensor, " U"]:
        """The place in the line of the last action of each unit; -1 where a unit has none."""
        ends = ids >= 0  # where the next action has another id; the last of these is what is wanted
        ends[:-1] &= ids[:-1] != ids[1:]
        place = ends.nonzero()[:, 0]
        last = torch.full((units,), -1, dtype=torch.int64, device=ids.device)
        return last.scatter_reduce_(0, ids[place], place, "amax")


def action_line(rollouts: Rollouts, *, observations: bool = False) -> Line:
    """Lay out the action positions of all trajectories.

    Args:
        observations: also what a row holds between its first and its last action, such as tool output.
    """
    by_place = torch.argsort(rollouts.row_index, stable=True)
    rows = by_place[torch.argsort(rollouts.trajectory_ids[by_place], stable=True)]
    mask = _first_to_last(rollouts.action_mask) if observations else rollouts.action_mask
    mask = mask[rows]
    shape = (rollouts.batch, rollouts.width)
    positions = mask.reshape(-1).nonzero()[:, 0]
    moved, count = rows - torch.arange(len(rows), device=rows.device), mask.sum(1)
    if bool((moved != 0).any()):
        positions = positions + rollouts.width * torch.repeat_interleave(moved, count, output_size=len(positions))
    trajectories = torch.repeat_interleave(rollouts.trajectory_ids[rows], count, output_size=len(positions))
    acts = rollouts.action_mask.reshape(-1)[positions] if observations else None
    return Line(positions, trajectories, shape, acts)


def _first_to_last(mask: Tensor) -> Tensor:
    """Each row's positions from its first action to its last."""
    if not mask.numel():
        return mask
    place = torch.arange(mask.shape[1], device=mask.device)
    first = mask.byte().argmax(1, keepdim=True)
    last = mask.shape[1] - 1 - mask.flip(1).byte().argmax(1, keepdim=True)
    return (place >= first) & (place <= last) & mask.any(1, keepdim=True)
