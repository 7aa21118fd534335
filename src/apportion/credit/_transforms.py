"""Changes of credit: by sign, by size, by normalising."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Settings, transform
from apportion.functional import (
    EpsInside,
    Moments,
    at_members,
    group_statistics,
    row_moments,
    segment_any,
    segment_count,
    segment_sum,
)
from apportion.types import Cover, Credit, Rollouts, Signal


@transform()
def scale_by_sign(
    credit: Credit, rollouts: Rollouts, *, positive: float = 1.0, negative: float = 1.0, drop_zero: bool = False
) -> Credit:
    """Weigh what is pushed up and what is pushed down differently.

    `A' = positive * A where A > 0, negative * A where A < 0`.

    Source: NSR and W-REINFORCE, arXiv 2506.01347; `drop_zero` as its released runs, which leave the other
        class out of the batch.
    Reads: nothing more. Scope: row. Unit: token.
    Cost: none.
    Laws: the sign of every advantage is kept, for weights above 0.
    Degenerate: an advantage of 0 stays 0; with `drop_zero` it leaves the mask, so an all-correct batch of NSR is empty.

    Args:
        credit: what to change. rollouts: the batch.
        positive: weight where the advantage is above 0.
        negative: weight where it is below 0.
        drop_zero: the loss does not count positions whose advantage is 0 afterwards (its token mean runs over the rest).

    Example:
        >>> from apportion.credit import chain, signed_outcome
        >>> r = Rollouts.from_lists([[5], [6, 7]], [0, 0], outcome=[1.0, 0.0])
        >>> chain(signed_outcome(), scale_by_sign(positive=0.1))(r).advantages
        tensor([[ 0.1000,  0.0000],
                [-1.0000, -1.0000]])
    """
    up, down = credit.advantages > 0, credit.advantages < 0
    factor = torch.ones_like(credit.advantages).masked_fill(up, positive).masked_fill(down, negative)
    scaled = credit.scaled(factor, rollouts)
    return scaled.narrowed(scaled.advantages != 0) if drop_zero else scaled


@transform()
def clip(credit: Credit, rollouts: Rollouts, *, limit: float = 5.0) -> Credit:
    """No advantage beyond the limit: `A' = min(max(A, -limit), limit)`.

    Source: common practice. Reads: nothing more. Scope: row. Unit: token; the difference is the part `clip`.
    Cost: none.
    Laws: clipping twice is clipping once. Degenerate: none.

    Args:
        credit: what to change. rollouts: the batch.
        limit: above 0.

    Raises:
        ValueError: a limit not above 0.

    Example:
        >>> from apportion.credit import chain, signed_outcome
        >>> r = Rollouts.from_lists([[5]], [0], outcome=[1.0])
        >>> credit = chain(signed_outcome(high=7.0), clip(limit=2.0))(r)
        >>> credit.advantages, credit.parts["clip"].values
        (tensor([[2.]]), tensor([[-5.]]))
    """
    if limit <= 0:
        raise ValueError(f"clip needs a limit above 0; got {limit:g}. To drop credit use scale_by_sign.")
    return credit.replaced(credit.advantages.clamp(-limit, limit), "clip")


@transform(requires=("truncated",))
def without_truncated(credit: Credit, rollouts: Rollouts) -> Credit:
    """Trajectories that were cut by the length limit leave the loss; what their group was compared with stays as it was.

    Source: overlong filtering, DAPO, arXiv 2503.14476 section 3.4; TRL's `mask_truncated_completions`.
    Reads: truncated, of a trajectory's last row. Scope: row. Unit: token.
    Cost: none.
    Degenerate: with everything cut nothing is counted; the note `truncated_trajectories` says how many were left out.

    Args:
        credit: what to change. rollouts: the batch.

    Example:
        >>> from apportion.credit import chain, signed_outcome
        >>> r = Rollouts.from_lists([[5], [6, 7]], [0, 0], outcome=[1.0, 0.0], truncated=[False, True])
        >>> chain(signed_outcome(), without_truncated())(r).mask
        tensor([[ True, False],
                [False, False]])
    """
    assert rollouts.truncated is not None
    ids, index, count = rollouts.trajectory_ids, rollouts.row_index, rollouts.num_trajectories
    ends = index == index.new_full((count,), -1).scatter_reduce(0, ids, index, "amax")[ids]
    cut = segment_any(rollouts.truncated & ends, ids, count)
    notes = {**credit.notes, "truncated_trajectories": float(cut.sum())}
    return replace(credit.narrowed(~cut[ids][:, None]), notes=notes)


def _over(s: Settings) -> Cover:
    return "group" if s["over"] == "group" else "batch"


def _whitened_laws(over: str, before: tuple[str, ...]) -> tuple[str, ...]:
    """One constant in every advantage is taken off again; equal rewards give 0 if they are equal in what is pooled."""
    shift = ("shift",) if {"shift", "additive"} & set(before) else ()
    equal = ("equal",) if "equal" in before or (over == "group" and "additive" in before) else ()
    return shift + equal


@transform(
    scope=_over,
    needs_group_of=lambda s: 2 if s["over"] == "group" else 1,
    laws=lambda s, before: _whitened_laws(s["over"], before),
)
def whiten(
    credit: Credit,
    rollouts: Rollouts,
    *,
    over: Literal["batch", "group"] = "batch",
    unit: Literal["token", "trajectory"] = "token",
    ddof: int = 1,
    eps: float = 1e-8,
    eps_inside: EpsInside = "var",
) -> Credit:
    """Zero mean and unit variance over the tokens of the mask, or over trajectories, of the batch or of each group.

    `A' = (A - mean) / sqrt(var + eps)`, or `/ (std + eps)` for `eps_inside="std"`.

    Source: as in the PPO code of ReFT, arXiv 2401.08967 (batch, eps 1e-8 inside); CAPO, 2508.02298 (group); GDPO,
        2601.05242 (trajectories of the batch).
    Reads: nothing more. Scope: `over`. Unit: each part keeps its own; the mean taken off is the part `baseline`.
    Cost: none.
    Laws: the sum over what is counted is 0; adding a constant to every advantage changes nothing. Returns are not touched.
    Degenerate: equal advantages give exactly 0; a group of one trajectory gives 0 (`over="group"`).

    Args:
        credit: what to change. rollouts: the batch.
        over: what is normalised together.
        unit: "token" counts every token, so that a long response weighs more than a short one; "trajectory" counts each
            trajectory once, with the mean of its tokens in the mask (one that has none has no say).
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: keeps the division finite.
        eps_inside: "var" for `sqrt(var + eps)`, "std" for `std + eps`, "floor" for `sqrt(max(var, eps))`.

    Example:
        >>> from apportion.credit import chain, signed_outcome
        >>> r = Rollouts.from_lists([[5], [6]], [0, 1], outcome=[1.0, 0.0])
        >>> chain(signed_outcome(), whiten(ddof=0, eps=0.0))(r).advantages
        tensor([[ 1.],
                [-1.]])
    """
    groups = rollouts.num_groups if over == "group" else 1
    rows = rollouts.group_ids if over == "group" else torch.zeros_like(rollouts.group_ids)
    stats: Moments
    if unit == "token":
        stats = row_moments(credit.advantages, credit.mask, rows, groups)
    else:
        ids = rollouts.trajectory_groups if over == "group" else torch.zeros_like(rollouts.trajectory_groups)
        stats = group_statistics(_trajectory_means(credit, rollouts), ids, groups)
    divisor = stats.spread(ddof, eps, eps_inside)
    if over == "group":
        divisor = torch.where(_trajectories_in(credit, rollouts) < 2, torch.inf, divisor)
    mean = stats.low + stats.mean
    advantages = (credit.advantages - at_members(mean, rows)[:, None]).div_(at_members(divisor, rows)[:, None])
    advantages = torch.where(credit.mask, advantages, 0.0)
    parts = {k: _divided(v, divisor, over, rollouts) for k, v in credit.parts.items()}
    name = "baseline"
    while name in parts:
        name += "'"
    parts[name] = Signal(-mean / divisor, over)
    return replace(credit, advantages=advantages, parts=parts)


def _trajectory_means(credit: Credit, rollouts: Rollouts) -> Tensor:
    """The mean advantage of each trajectory over its positions in the mask, [N]; NaN where it has none."""
    total, count = (
        segment_sum(x.sum(1, dtype=torch.float64), rollouts.trajectory_ids, rollouts.num_trajectories)
        for x in (credit.advantages, credit.mask)
    )
    return total / count


def _trajectories_in(credit: Credit, rollouts: Rollouts) -> Tensor:
    """How many trajectories of each group have a position in the mask, [G]."""
    rows = credit.mask.any(1)
    seen = torch.unique(rollouts.trajectory_ids[rows])
    return segment_count(rollouts.trajectory_groups[seen], rollouts.num_groups)


def _divided(part: Signal, divisor: Tensor, over: str, rollouts: Rollouts) -> Signal:
    """The part over its own group's divisor, at its own unit."""
    if over == "batch":
        return replace(part, values=part.values / divisor)
    if part.unit == "batch":
        return Signal(part.values / divisor, "group")
    return replace(part, values=part.values / _of_units(divisor, part.unit, rollouts))


def _of_units(values: Tensor, unit: str, rollouts: Rollouts) -> Tensor:
    """The value of the group that each trajectory, position or span lies in."""
    if unit == "group":
        return values
    if unit == "trajectory":
        return values[rollouts.trajectory_groups]
    if unit == "token":
        return values[rollouts.group_ids][:, None]
    return values[rollouts.group_ids[rollouts.spans[unit].row]]
