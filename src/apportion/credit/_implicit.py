"""Credit from the log-ratio of a learnt reward model to the policy, summed over turns (OPRL, also called iStar)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, Settings, assemble, dialect, estimator, measured_mask, trajectory_values
from apportion.credit._turns import above_mean, owners, timeline
from apportion.functional import at_members, group_statistics, segment_count, segment_sum
from apportion.types import Cover, Credit, Rollouts, Signal


def _requires(s: Settings) -> tuple[str, ...]:
    return ("signals.{reward}", *(("spans.{spans}", "signals.{ratio}") if s["alpha"] else ()))


def _scope(s: Settings) -> Cover:
    return "batch" if s["alpha"] and s["rescale"] else "group"


def _laws(s: Settings) -> tuple[str, ...]:
    return ("shift", "equal", "scale" if s["scale"] else "linear")


@estimator(requires=_requires, scope=_scope, needs_group_of=2, laws=_laws)
def oprl(
    rollouts: Rollouts,
    *,
    beta: float = 0.05,
    alpha: float = 1.0,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std"] | None = "std",
    pool: Literal["all", "first"] = "all",
    rescale: Literal["batch_max"] | None = None,
    gate: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
    ratio: str = "log_ratio",
    reward: str = "outcome",
    spans: str = "turn",
) -> Credit:
    """Group-relative credit of the outcome, plus that of each turn's implicit reward among all turns of the group.

    `r_(i,t) = beta * sum over the turn's actions of (ln pi_phi - ln pi_old)`,
    `A_(i,t) = (o_i - mean) / (std + eps) + alpha (r_(i,t) - mean) / (std + eps)`: the first over the trajectories of
    the group, the second over all their turns.

    Source: OPRL, arXiv 2509.19199 (later named iStar). Its code differs, see `pool`, `rescale` and `oprl.released()`.
    Reads: signals[reward], signals[ratio] [B, T], spans[spans]. Scope: group; batch if `rescale`. Unit:
        trajectory, plus `spans` for the implicit rewards.
    Cost: a second trained model: its pass over the rollouts, and its update (`losses.implicit_prm_loss`).
    Laws: adding a constant to the outcomes of a group changes nothing; `alpha=0.0` is GRPO, and so is phi = old.
    Degenerate: a group with one measured trajectory gets 0; equal outcomes leave the turn part alone (`gate`); a turn
        without action tokens has r = 0 and counts; an unmeasured token adds nothing, a turn with no other is not
        compared, both in notes; an unmeasured outcome advantage 0 and mask False; actions outside every turn get the
        outcome part.

    Args:
        rollouts: the batch.
        beta: nats to reward; with `scale="std"` it only matters beside eps.
        alpha: weight of the turn part.
        baseline: "mean", or the mean of the others ("leave_one_out", the code's RLOO form: K / (K-1) times as far).
        scale: divide both parts by their deviation, or not (None).
        pool: statistics of the turn part over "all" turns (the paper), or over the "first" of each trajectory (the
            code, where it is the first in the batch rather than in time).
        rescale: None leaves r in nats; "batch_max" divides it by the largest |r| of the batch plus 1e-6 (the code's
            default).
        gate: no turn part in groups whose outcomes are equal; the reward model learnt nothing from them.
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        ratio: token signal, `ln pi_phi - ln pi_old`.
        reward: signal with one outcome per trajectory.
        spans: the turns.

    Raises:
        ValueError: the log-ratio is not a token signal with one number each.

    Example:
        >>> from apportion import Spans
        >>> r = Rollouts.from_lists([[1, 2], [3, 4]], [0, 0], outcome=[1.0, 0.0],
        ...     spans={"turn": Spans.from_lists([[(0, 1), (1, 2)], [(0, 2)]])},
        ...     signals={"log_ratio": Signal(torch.tensor([[0.4, 0.2], [0.0, -0.3]]), "token")})
        >>> oprl(r, scale=None, beta=1.0).advantages
        tensor([[ 0.8000,  0.6000],
                [-0.9000, -0.9000]])
    """
    outcomes = trajectory_values(rollouts, reward, "oprl")
    stats = group_statistics(outcomes, rollouts.trajectory_groups, rollouts.num_groups)
    of_outcome = _from_others(above_mean(stats, scale, ddof, eps), stats.ids, stats.count, baseline)
    parts = {reward: Signal(of_outcome, "trajectory")}
    compared = stats.count >= 2
    notes = {"equal_groups": float((stats.flat & compared).sum()) / max(int(compared.sum()), 1)}
    if alpha:
        rewards, found = _turn_rewards(rollouts, ratio, spans, beta)
        speaks = compared & ~stats.flat if gate else compared
        of = owners(rollouts, spans)
        counted = at_members(speaks, stats.ids)[of]
        rewards = torch.where(stats.measured[of], rewards, torch.nan)
        if rescale:
            rewards = rewards / (1e-6 + (rewards.nan_to_num(nan=0.0).abs().amax() if len(rewards) else 0.0))
        groups = torch.where(counted, rollouts.trajectory_groups[of], -1)
        of_turn = _turn_part(rollouts, rewards, groups, spans, baseline, scale, pool, ddof, eps)
        parts[ratio] = Signal(alpha * of_turn, spans)
        notes |= found
    return assemble(rollouts, measured_mask(rollouts, stats.measured), parts, notes=notes)


def _turn_rewards(rollouts: Rollouts, ratio: str, spans: str, beta: float) -> tuple[Tensor, dict[str, float]]:
    """`beta` times the summed log-ratio of each turn, NaN where all its actions are unmeasured, [S]."""
    signal = rollouts.signals[ratio]
    if signal.unit != "token" or signal.values.dim() != 2:
        raise ValueError(
            f"oprl needs signals[{ratio!r}] with one number per token; got unit {signal.unit!r} and shape "
            f"{list(signal.values.shape)}. Give ln pi_phi - ln pi_old at each position."
        )
    values, turns = signal.values.flatten(), len(rollouts.spans[spans])
    acting = torch.where(rollouts.action_mask, rollouts.span_ids(spans), -1).flatten()
    known = torch.where(values.isnan(), -1, acting)
    rewards = beta * segment_sum(values, known, turns)
    lost = acting[(acting >= 0) & (known < 0)]
    if len(lost):
        nothing = (segment_count(lost, turns) > 0) & (segment_count(known, turns) == 0)
        rewards = torch.where(nothing, torch.nan, rewards)
    measured = rewards[~rewards.isnan()]
    notes = {
        "unmeasured_tokens": float(len(lost)),
        "unmeasured_turns": float(turns - len(measured)),
        "mean_turn_reward": float(measured.mean()) if len(measured) else 0.0,
    }
    return rewards, notes


def _turn_part(
    rollouts: Rollouts,
    rewards: Tensor,
    groups: Tensor,
    spans: str,
    baseline: str,
    scale: Literal["std"] | None,
    pool: str,
    ddof: int,
    eps: float,
) -> Tensor:
    """Each turn's reward above its group's, [S]; 0 for turns that are not measured or in no group (-1)."""
    members = groups if pool == "all" else torch.where(_first_turns(rollouts, spans, rewards), groups, -1)
    stats = group_statistics(rewards, members, rollouts.num_groups)
    inside = torch.where(rewards.isnan(), -1, groups)
    above = torch.where(stats.measured, stats.y, rewards - at_members(stats.low, inside)) - at_members(
        stats.mean, inside
    )
    if scale:
        above = above / at_members(stats.spread(ddof, eps, "std"), inside)
    above = _from_others(above, inside, stats.count, baseline)
    return torch.where(inside >= 0, above, 0.0)


def _first_turns(rollouts: Rollouts, spans: str, rewards: Tensor) -> Tensor:
    """Whether each turn is its trajectory's first measured one."""
    line = timeline(rollouts, spans)
    measured = ~rewards[line.order].isnan()
    place = torch.arange(len(line.owner), device=rewards.device)
    first = torch.full((rollouts.num_trajectories,), len(place), dtype=torch.int64, device=rewards.device)
    first = first.scatter_reduce(0, line.owner[measured], place[measured], "amin")
    return line.back(measured & (place == first[line.owner]))


def _from_others(above: Tensor, ids: Tensor, count: Tensor, baseline: str) -> Tensor:
    """Above the mean of the others instead: `n / (n-1)` times as far."""
    return above * at_members(count / (count - 1).clamp(min=1), ids) if baseline == "leave_one_out" else above


@dialect(oprl)
def released(*, beta: float = 0.05, alpha: float = 1.0) -> Estimator:
    """The numbers of the released scripts: leave-one-out, no deviation, rewards of the turns in units of the largest.

    Source: Tongyi-ConvAI/Tongyi-Character, CharacterRL-iStar, estimator `istar_rloo`. Departs: a group of one gets 0;
        the largest |r| is that of the batch, where the code takes each worker's share; "first" is in time.
    Cost: a second trained model.

    Example:
        >>> oprl.released()
        oprl(beta=0.05, alpha=1.0, baseline='leave_one_out', scale=None, pool='first', rescale='batch_max')
    """
    return oprl(beta=beta, alpha=alpha, baseline="leave_one_out", scale=None, pool="first", rescale="batch_max")
