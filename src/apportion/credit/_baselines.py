"""Further baselines for outcomes: by length, greedy, of the useful samples, the next best, the mean reward as the scale."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import (
    Estimator,
    Settings,
    alias,
    assemble,
    dialect,
    estimator,
    measured_mask,
    trajectory_values,
)
from apportion.credit._group import group_relative, unless_alone
from apportion.functional import GroupStatistics, at_members, group_statistics, segment_count, segment_max
from apportion.types import Credit, Rollouts, Signal

Singleton = Literal["zero", "raw"]


@alias
def opo(*, reward: str = "outcome", singleton: Singleton = "zero") -> Estimator:
    """On-policy RL with the optimal baseline: above the group's mean reward, weighted by length.

    `A_i = r_i - (sum_k l_k r_k) / (sum_k l_k)`, l the number of actions.

    Source: OPO, arXiv 2505.23585; the optimal baseline if the tokens' score functions are orthogonal and of equal size.
        verl 0.9.1 gives a lone response its reward: `singleton="raw"`.
    Cost: none beyond the rollouts.

    Example:
        >>> opo()
        group_relative(reward='outcome', baseline='length_weighted', scale=None, singleton='zero')
    """
    return group_relative(reward=reward, baseline="length_weighted", scale=None, singleton=singleton)


@alias
def max_rl(*, reward: str = "outcome") -> Estimator:
    """Maximum likelihood RL: above the group's mean, in units of that mean, so that rare successes weigh most.

    `A_i = (r_i - mean) / mean`, 0 if the mean is not above 0. For rewards that are not negative.

    Source: MaxRL, arXiv 2602.02710.
    Cost: none beyond the rollouts.

    Example:
        >>> max_rl()
        group_relative(reward='outcome', scale='mean', eps=0.0)
    """
    return group_relative(reward=reward, scale="mean", eps=0.0)


@dialect(max_rl)
def skyrl(*, reward: str = "outcome") -> Estimator:
    """SkyRL's maxrl: `(r - mean) / (mean + 1e-6)`; alone its reward.

    Source: skyrl 0.3.0, `compute_maxrl_advantage`. Departs: a mean below 0 turns every sign there, and gives 0 here.
    Cost: none beyond the rollouts.
    """
    return group_relative(reward=reward, scale="mean", eps=1e-6, singleton="raw")


@dialect(max_rl)
def prime_rl(*, reward: str = "outcome") -> Estimator:
    """prime-rl's max_rl: `(r - mean) / mean`, 0 if the mean is not above 0; alone 0.

    Source: prime-rl 559b447, `MaxRLAlgorithm.score_group`.
    Cost: none beyond the rollouts.
    """
    return max_rl(reward=reward)


@estimator(requires=("signals.{reward}", "signals.{greedy}"), laws=("additive", "linear"))
def remax(rollouts: Rollouts, *, reward: str = "outcome", greedy: str = "greedy_outcome") -> Credit:
    """Reward above that of the greedy response to the same prompt: `A_i = r_i - r_greedy`.

    Source: ReMax, arXiv 2310.10505, for a reward at the end of the response; as in verl 0.9.1.
    Reads: signals[reward] per trajectory, signals[greedy] per group. Scope: row. Unit: trajectory, less a part of the group.
    Cost: a greedy response per prompt, and its reward.
    Laws: a constant added to the outcomes, and not to the greedy one, is added to the advantages.
    Degenerate: without either reward advantage 0 and mask False; a group of one is like any other.

    Args:
        rollouts: the batch.
        reward: name of the outcome, one number per trajectory.
        greedy: name of the greedy response's outcome, one number per group.

    Raises:
        ValueError: a signal with another unit.

    Example:
        >>> r = Rollouts.from_lists([[5], [6, 7]], [0, 0], outcome=[1.0, 0.0])
        >>> r = r.with_signals(greedy_outcome=Signal(torch.tensor([0.75]), "group"))
        >>> remax(r).advantages
        tensor([[ 0.2500,  0.0000],
                [-0.7500, -0.7500]])
    """
    values, base = trajectory_values(rollouts, reward, "remax"), rollouts.signals[greedy]
    if base.unit != "group" or base.values.dim() != 1:
        raise ValueError(
            f"remax needs signals[{greedy!r}] with one value per group; got unit {base.unit!r} and shape "
            f"{list(base.values.shape)}. Measure the greedy response once per prompt."
        )
    measured = ~values.isnan() & ~base.values.isnan()[rollouts.trajectory_groups]
    parts = {
        reward: Signal(values.nan_to_num(nan=0.0), "trajectory"),
        greedy: Signal(-base.values.double().nan_to_num(nan=0.0), "group"),
    }
    return assemble(rollouts, measured_mask(rollouts, measured), parts, notes=_unmeasured(measured))


def _gpg_laws(s: Settings) -> tuple[str, ...]:
    compared = () if s["singleton"] == "raw" else ("shift", "equal") if s["valid"] == "informative" else ("equal",)
    return (*compared, "linear")


@estimator(
    requires=("signals.{reward}",),
    scope="batch",
    needs_group_of=lambda s: 1 if s["singleton"] == "raw" else 2,
    laws=_gpg_laws,
)
def gpg(
    rollouts: Rollouts,
    *,
    reward: str = "outcome",
    valid: Literal["nonzero", "informative"] = "nonzero",
    f_norm: float = 1.0,
    singleton: Singleton = "zero",
) -> Credit:
    """Group policy gradient: above the group's mean, grown by the share of the batch that teaches nothing.

    `A_i = (N / N_valid) (r_i - mean) / f_norm`, N the measured trajectories of the batch.

    Source: GPG, arXiv 2504.02546. `valid="nonzero"` as in verl 0.9.1, `compute_gpg_outcome_advantage`; "informative" as in
        the authors' code (AMAP-ML/GPG e096da8, which divides the loss by N_valid / N + 1e-5).
    Reads: signals[reward] per trajectory. Scope: batch. Unit: trajectory.
    Cost: none beyond the rollouts.
    Laws: with "informative" a constant added to all rewards changes nothing; with "nonzero" it changes what is valid.
    Degenerate: a group of one 0 (`singleton`); equal rewards 0; no valid trajectory in the batch: N_valid counts as 1;
        unmeasured: in no count, advantage 0, mask False.

    Args:
        rollouts: the batch.
        reward: name of the signal, one number per trajectory.
        valid: which trajectories are counted: those with a reward other than 0, or all of groups with unequal rewards.
        f_norm: a constant divisor, not 0.
        singleton: a group with one measured member gets 0 ("zero") or, as in verl, its reward in place of the difference.

    Raises:
        ValueError: f_norm is 0; a signal with another unit.

    Example:
        >>> r = Rollouts.from_lists([[5], [6], [7], [8]], [0, 0, 0, 0], outcome=[1.0, 0.0, 0.0, 0.0])
        >>> gpg(r).advantages[:2, 0], gpg(r, valid="informative").advantages[:2, 0]
        (tensor([ 3., -1.]), tensor([ 0.7500, -0.2500]))
    """
    if f_norm == 0:
        raise ValueError("gpg needs f_norm other than 0; got 0. The paper's simplest choice is 1.")
    values = trajectory_values(rollouts, reward, "gpg")
    stats = group_statistics(values, rollouts.trajectory_groups, rollouts.num_groups)
    counted = values != 0 if valid == "nonzero" else ~at_members(stats.flat, stats.ids)
    share = (counted & stats.measured).double().sum().clamp(min=1) / stats.count.sum().clamp(min=1)
    above = unless_alone(stats.y - at_members(stats.mean, stats.ids), values, stats, stats.count == 1, singleton)
    part = Signal(above / (share * f_norm), "trajectory")
    notes = {"valid": float(share), **_unmeasured(stats.measured)}
    return assemble(rollouts, measured_mask(rollouts, stats.measured), {reward: part}, notes=notes)


@estimator(
    requires=("signals.{reward}",),
    scope="group",
    needs_group_of=2,
    laws=lambda s: ("shift", "equal") if s["norm_by_std"] else ("shift", "equal", "linear"),
)
def pass_at_k(
    rollouts: Rollouts, *, reward: str = "outcome", norm_by_std: bool = True, ddof: int = 1, eps: float = 1e-6
) -> Credit:
    """What the best of the group would lose without this response; only the single best one gets credit.

    `A_i = (max_k r_k - max_(k != i) r_k) / (std + eps)`: best minus second best for the best, 0 for all others.

    Source: arXiv 2503.19595, as in verl 0.9.1, `compute_grpo_passk_outcome_advantage`.
    Reads: signals[reward] per trajectory. Scope: group. Unit: trajectory.
    Cost: none beyond the rollouts.
    Laws: adding a constant to the rewards of a group changes nothing; no advantage is negative.
    Degenerate: where several share the best reward each of them can be spared: 0 for all (in verl one of them is chosen,
        and gets the difference, which is 0 too); a group of one 0 (an error in verl); unmeasured: advantage 0, mask False.

    Args:
        rollouts: the batch.
        reward: name of the signal, one number per trajectory.
        norm_by_std: divide by the group's deviation.
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.

    Example:
        >>> r = Rollouts.from_lists([[5], [6], [7], [8]], [0, 0, 0, 0], outcome=[1.0, 0.5, 0.0, 0.0])
        >>> pass_at_k(r, norm_by_std=False).advantages[:, 0]
        tensor([0.5000, 0.0000, 0.0000, 0.0000])
    """
    values = trajectory_values(rollouts, reward, "pass_at_k")
    stats = group_statistics(values, rollouts.trajectory_groups, rollouts.num_groups)
    gain = _above_next_best(stats)
    if norm_by_std:
        gain = gain / at_members(stats.spread(ddof, eps, "std"), stats.ids)
    part = Signal(torch.where(stats.measured, gain, 0.0), "trajectory")
    mask = measured_mask(rollouts, stats.measured)
    return assemble(rollouts, mask, {reward: part}, notes=_unmeasured(stats.measured))


def _above_next_best(stats: GroupStatistics) -> Tensor:
    """Largest member of the group minus the largest of the others, for each member."""
    groups = len(stats.count)
    best = stats.measured & (stats.y == at_members(segment_max(stats.y, stats.ids, groups), stats.ids))
    single = segment_count(torch.where(best, stats.ids, -1), groups) == 1
    second = segment_max(stats.y, torch.where(best, -1, stats.ids), groups)
    gain = stats.y - at_members(second, stats.ids)
    return torch.where(best & at_members(single & (stats.count > 1), stats.ids), gain, 0.0)


def _unmeasured(measured: Tensor) -> dict[str, float]:
    return {"unmeasured": float((~measured).sum())}
