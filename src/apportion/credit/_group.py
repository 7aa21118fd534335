"""Credit by comparison inside a group: every convention of the GRPO family as a named setting."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.credit._base import Estimator, Settings, alias, assemble, estimator, measured_mask
from apportion.functional import EpsInside, GroupStatistics, at_members, group_statistics, segment_sum
from apportion.types import Cover, Credit, Rollouts, Signal

Baseline = Literal["mean", "leave_one_out", "length_weighted", "none"]
Scale = Literal["std", "leave_one_out_std", "batch_std", "mean"]
_UNITS = ("trajectory", "token")


def _requires(s: Settings) -> tuple[str, ...]:
    return ("signals.{reward}",) if s["unit"] in _UNITS else ("spans.{unit}", "signals.{reward}")


def _scope(s: Settings) -> Cover:
    return "batch" if s["scale"] == "batch_std" else "group"


def _needs_group_of(s: Settings) -> int:
    several = s["pool"] == "all" and s["unit"] not in _UNITS  # the spans of one trajectory are compared too
    return 2 if _compares(s["baseline"], s["scale"]) and s["singleton"] != "raw" and not several else 1


def _compares(baseline: str, scale: str | None) -> bool:
    """Whether a member's advantage depends on the others of its group."""
    return baseline != "none" or scale not in (None, "batch_std")


def _laws(s: Settings) -> tuple[str, ...]:
    if s["baseline"] == "none" or s["singleton"] == "raw":
        return ()
    return ("equal",) if s["scale"] == "mean" else ("shift", "equal")


@estimator(requires=_requires, scope=_scope, needs_group_of=_needs_group_of, laws=_laws)
def group_relative(
    rollouts: Rollouts,
    *,
    reward: str = "outcome",
    unit: str = "trajectory",
    baseline: Baseline = "mean",
    scale: Scale | None = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    eps_inside: EpsInside = "std",
    flat: Literal["zero", "unscaled"] = "zero",
    singleton: Literal["zero", "raw", "error"] = "zero",
    pool: Literal["index", "all"] = "index",
) -> Credit:
    """Reward of each member above what its group got.

    `A_u = (x_u - baseline) / (scale + eps)` over the measured members u of a group.

    Source: GRPO, arXiv 2402.03300; without the deviation, Dr. GRPO, 2503.20783; leave-one-out, 2402.14740; weighted by
        length, OPO, 2505.23585; divided by the mean, MaxRL, 2602.02710. What other trainers compute: `.trl()`, `.verl()` ...
        Departs: equal rewards give exactly 0 also when they are not representable in binary.
    Reads: signals[reward], spans[unit]. Scope: group, or batch for `scale="batch_std"`. Unit: `unit`.
    Cost: none beyond the rollouts.
    Laws: adding a constant to the rewards of a group changes nothing (not for `baseline="none"` or `scale="mean"`);
        with `baseline="mean"` the advantages of a group's members sum to 0, with "length_weighted" those of its actions.
    Degenerate: a group with one measured member gets 0 (`singleton`) if members are compared; equal rewards 0 if a
        baseline or a scale is used; a mean reward not above 0 gives 0 (`scale="mean"`, `flat`); an unmeasured
        trajectory advantage 0 and mask False; an unmeasured span or token 0, counted in notes; an empty response counts
        in the statistics, since its reward was measured.

    Args:
        rollouts: the batch.
        reward: name of the signal. One coarser than `unit` is given to each member (a token then weighs like any other).
        unit: what is compared: "trajectory", "token" (all tokens of the group together), or the name of a span set.
        baseline: "mean" of the group, mean of the others ("leave_one_out"), mean in which each member weighs as much as
            it has actions ("length_weighted"), or "none".
        scale: deviation of the group, of the others, of all rewards of the batch, the group's mean reward, or None.
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the scale.
        eps_inside: "std" for `std + eps`, "var" for `sqrt(var + eps)`, "floor" for `sqrt(max(var, eps))`. `scale="mean"`
            always adds outside.
        flat: where there is nothing to divide by (those whose deviation is taken are equal or too few, or their mean is
            not above 0), the advantage is 0 ("zero") or what is above the baseline ("unscaled").
        singleton: a group with one measured member gets 0 ("zero"), its reward itself ("raw"), or an error.
        pool: spans of equal `index` in the group are compared ("index"), or all spans of the group ("all").

    Raises:
        ValueError: the reward is finer than the unit; a group has one member and `singleton="error"`.

    Example:
        >>> r = Rollouts.from_lists([[5], [6, 7]], [0, 0], outcome=[1.0, 0.0])
        >>> group_relative(r, scale=None).advantages
        tensor([[ 0.5000,  0.0000],
                [-0.5000, -0.5000]])
    """
    values, ids, groups = _members(rollouts, reward, unit, pool)
    stats = group_statistics(values, ids, groups)
    alone = (stats.count == 1) & _compares(baseline, scale)
    if singleton == "error" and bool(alone.any()):
        raise ValueError(
            f"group_relative needs two measured members in a group; {int(alone.sum())} of {groups} have one. "
            'Sample more, or set singleton="zero".'
        )
    actions = _actions_in(rollouts, unit) if baseline == "length_weighted" else None
    above = above_baseline(stats, values, baseline, actions)
    advantage = above / scale_of(stats, values, scale, ddof, eps, eps_inside, flat)
    advantage = unless_alone(advantage, values, stats, alone, singleton)
    part = Signal(advantage.view(_unit_shape(rollouts, unit)), unit)
    mask = measured_mask(rollouts, _measured_trajectories(rollouts, reward))
    return assemble(rollouts, mask, {reward: part}, notes=_notes(stats))


def _members(rollouts: Rollouts, reward: str, unit: str, pool: str) -> tuple[Tensor, Tensor, int]:
    """The values of the members, in float64, what each is compared with, and how many such groups there are."""
    signal = rollouts.signals[reward]
    if signal.values.dim() != (2 if signal.unit == "token" else 1):
        raise ValueError(
            f"group_relative needs signals[{reward!r}] with one number each; it has the axes {signal.axes}. "
            "Aggregate them first."
        )
    if unit == "token":
        ids = torch.where(rollouts.action_mask, rollouts.group_ids[:, None], -1)
        return _token_values(rollouts, signal).flatten(), ids.flatten(), rollouts.num_groups
    if unit == "trajectory":
        return _coarse(rollouts, reward, unit), rollouts.trajectory_groups, rollouts.num_groups
    spans = rollouts.spans[unit]
    ids = rollouts.group_ids[spans.row]
    if pool == "index" and len(spans):
        ids = ids * (int(spans.index.max()) + 1) + spans.index
        used, ids = torch.unique(ids, return_inverse=True)
        return _coarse(rollouts, reward, unit), ids, len(used)
    return _coarse(rollouts, reward, unit), ids, rollouts.num_groups


def _token_values(rollouts: Rollouts, signal: Signal) -> Tensor:
    """The signal at every position; NaN at positions outside every span of a span signal."""
    values = rollouts.at_tokens(signal).double()
    return (
        torch.where(rollouts.unit_ids(signal.unit) < 0, torch.nan, values) if signal.unit in rollouts.spans else values
    )


def _coarse(rollouts: Rollouts, reward: str, unit: str) -> Tensor:
    """The reward of each trajectory or span; a coarser signal is handed down."""
    signal = rollouts.signals[reward]
    values = signal.values.double()
    if signal.unit == unit:
        return values
    spans = rollouts.spans.get(unit)
    if signal.unit == "trajectory" and spans is not None:
        return values[rollouts.trajectory_ids[spans.row]]
    raise ValueError(
        f"group_relative(unit={unit!r}) needs a reward per {unit} or coarser; signals[{reward!r}] has unit "
        f"{signal.unit!r}. Aggregate it first, or set unit={signal.unit!r}."
    )


def _actions_in(rollouts: Rollouts, unit: str) -> Tensor:
    """How many actions each member has."""
    if unit == "token":
        return torch.ones(rollouts.action_mask.numel(), dtype=torch.float64, device=rollouts.device)
    if unit == "trajectory":
        return segment_sum(rollouts.action_mask.sum(1).double(), rollouts.trajectory_ids, rollouts.num_trajectories)
    spans = rollouts.spans[unit]
    before = pad(rollouts.action_mask.cumsum(1), (1, 0))
    return (before[spans.row, spans.stop] - before[spans.row, spans.start]).double()


def above_baseline(stats: GroupStatistics, values: Tensor, baseline: str, actions: Tensor | None = None) -> Tensor:
    """What each member got above the baseline of its group, weighted by `actions` if they are given."""
    if baseline == "none":
        return values
    if actions is not None:
        groups = len(stats.count)
        weight = segment_sum(actions, stats.ids, groups)
        mean = segment_sum(actions * stats.y, stats.ids, groups) / weight.clamp(min=1)
        return stats.y - at_members(mean, stats.ids)
    above = stats.y - at_members(stats.mean, stats.ids)
    n = at_members(stats.count, stats.ids)
    return above * n / (n - 1).clamp(min=1) if baseline == "leave_one_out" else above


def scale_of(
    stats: GroupStatistics,
    values: Tensor,
    scale: str | None,
    ddof: int,
    eps: float,
    eps_inside: EpsInside = "std",
    flat: str = "zero",
) -> Tensor:
    """The divisor of each member; where there is none +inf, hence advantage 0, or 1 for `flat="unscaled"`."""
    if scale is None:
        return torch.ones_like(stats.y)
    if scale == "std":
        divisor = at_members(stats.spread(ddof, eps, eps_inside), stats.ids)
    elif scale == "leave_one_out_std":
        divisor = stats.spread_of_others(ddof, eps, eps_inside)
    elif scale == "batch_std":
        everyone = torch.where(stats.ids >= 0, 0, -1)
        divisor = group_statistics(values, everyone, 1).spread(ddof, eps, eps_inside)
    else:
        mean = stats.low + stats.mean
        divisor = at_members(torch.where(stats.flat | (mean + eps <= 0), torch.inf, mean + eps), stats.ids)
    return divisor if flat == "zero" else torch.where(divisor.isinf(), 1.0, divisor)


def unless_alone(advantage: Tensor, values: Tensor, stats: GroupStatistics, alone: Tensor, singleton: str) -> Tensor:
    """The advantage of measured members; the only one of its group has its value ("raw") or 0, an unmeasured one 0."""
    kept = values if singleton == "raw" else torch.zeros_like(values)
    chosen = torch.where(at_members(alone, stats.ids), kept, advantage)
    return torch.where(stats.measured, chosen, 0.0)


def _unit_shape(rollouts: Rollouts, unit: str) -> tuple[int, ...]:
    return (rollouts.batch, rollouts.width) if unit == "token" else (rollouts.units(unit),)


def _measured_trajectories(rollouts: Rollouts, reward: str) -> Tensor:
    """Which trajectories have their own outcome; a finer signal excludes no trajectory."""
    signal = rollouts.signals[reward]
    if signal.unit == "trajectory":
        return ~signal.values.isnan()
    return torch.ones(rollouts.num_trajectories, dtype=torch.bool, device=rollouts.device)


def _notes(stats: GroupStatistics) -> dict[str, float]:
    """How many groups say nothing, and how many members were not measured."""
    several = stats.count >= 2
    unmeasured = int((~stats.measured).sum())
    return {
        "groups": float((stats.count > 0).sum()),
        "singleton_groups": float((stats.count == 1).sum()),
        "zero_signal_groups": float((several & stats.flat).sum()) / max(int(several.sum()), 1),
        "unmeasured": float(unmeasured),
    }


# ---- named compositions -----------------------------------------------------------------------------------------------


@alias
def grpo(*, reward: str = "outcome", eps: float = 1e-6, ddof: int = 1) -> Estimator:
    """Group relative policy optimisation: above the group's mean, in units of its sample deviation.

    Source: arXiv 2402.03300, with the sample deviation and `eps` outside, as in verl and SkyRL.
    Cost: none beyond the rollouts.

    Example:
        >>> grpo()
        group_relative(reward='outcome', baseline='mean', scale='std', ddof=1, eps=1e-06)
    """
    return group_relative(reward=reward, baseline="mean", scale="std", ddof=ddof, eps=eps)


@alias
def dr_grpo(*, reward: str = "outcome") -> Estimator:
    """GRPO without the deviation: above the group's mean.

    Source: arXiv 2503.20783. Its loss, too, differs from GRPO's; that is a setting of the loss.
    Cost: none beyond the rollouts.

    Example:
        >>> dr_grpo()
        group_relative(reward='outcome', baseline='mean', scale=None)
    """
    return group_relative(reward=reward, baseline="mean", scale=None)


@alias
def rloo(*, reward: str = "outcome") -> Estimator:
    """REINFORCE with the mean of the other members as the baseline.

    Source: arXiv 2402.14740.
    Cost: none beyond the rollouts.

    Example:
        >>> rloo()
        group_relative(reward='outcome', baseline='leave_one_out', scale=None)
    """
    return group_relative(reward=reward, baseline="leave_one_out", scale=None)
