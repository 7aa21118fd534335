"""Credit by comparing actions that were taken in the same state (GiGPO)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Settings, assemble, estimator, measured_mask
from apportion.credit._turns import above_mean, owners, timeline, turn_rewards
from apportion.functional import group_statistics
from apportion.types import Credit, Rollouts, Signal


def _requires(s: Settings) -> tuple[str, ...]:
    state = ("spans.{spans}.state",) if s["omega"] else ()
    return ("spans.{spans}", "signals.{reward}", *state)


def _laws(s: Settings) -> tuple[str, ...]:
    """What holds for the rewards of the turns; totals are only compared when no state is."""
    return (("shift", "equal") if not s["omega"] else ()) + (("scale",) if s["scale"] else ("linear",))


@estimator(requires=_requires, scope="group", needs_group_of=lambda s: 1 if s["omega"] else 2, laws=_laws)
def gigpo(
    rollouts: Rollouts,
    *,
    omega: float = 1.0,
    gamma: float = 0.95,
    scale: Literal["std"] | None = "std",
    episodes: Literal["trajectory", "turn"] = "trajectory",
    ddof: int = 1,
    eps: float = 1e-6,
    reward: str = "turn_reward",
    spans: str = "turn",
) -> Credit:
    """Group-relative credit of the episode, plus that of each turn among all turns that began in the same state.

    `A_(i,t) = (R_i - mean) / F + omega (G_(i,t) - mean of its anchor group) / F'`, with `R_i = sum_t r_(i,t)`,
    `G_(i,t) = sum_(k >= t) gamma^(k-t) r_(i,k)`, F the deviation plus eps of what the mean was taken over, or 1. The
    anchor group of a turn are the turns of its group with the same state, several of one trajectory included.

    Source: GiGPO, arXiv 2505.10978, equations 3 to 8, and its code (verl-agent). Departs: a single trajectory has no
        episode part, where the code keeps its raw return.
    Reads: signals[reward], spans[spans] with state. Scope: group. Unit: trajectory, plus `spans` for the state part.
    Cost: none beyond the rollouts, which must say which state each turn began in (`anchor_states`).
    Laws: the state part sums to 0 over every anchor group; states that never recur leave GRPO; rewards times a
        constant change nothing (`scale="std"`, up to eps) or scale the credit with them (None).
    Degenerate: equal totals leave the state part alone; a turn alone in its state has none; an unmeasured turn reward
        adds nothing, counted in notes; a trajectory without any measured turn reward advantage 0 and mask False; a
        turn without action tokens counts in the statistics; actions outside every turn get the episode part; a
        truncated episode keeps the rewards up to the cut.

    Args:
        rollouts: the batch.
        omega: weight of the state part; 0.0 is GRPO on the totals.
        gamma: discount per turn of the returns that are compared within a state.
        scale: divide both parts by the deviation of their group, or not (None, safer where groups are tiny or noisy).
        episodes: mean and deviation over the totals of the trajectories (the paper), or with each trajectory counted
            once per "turn", so that long ones weigh more (the released code's default).
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        reward: signal with one reward per turn.
        spans: the turns; `state` is equal where two turns of a group began in the same situation.

    Example:
        >>> from apportion import Spans
        >>> turns = Spans(row=torch.tensor([0, 1]), start=torch.tensor([0, 0]), stop=torch.tensor([2, 2]),
        ...               index=torch.tensor([0, 0]), state=torch.tensor([7, 7]))
        >>> r = Rollouts.from_lists([[1, 2], [3, 4]], [0, 0], spans={"turn": turns},
        ...                         signals={"turn_reward": Signal(torch.tensor([1.0, 0.0]), "turn")})
        >>> gigpo(r, scale=None).advantages
        tensor([[ 1.,  1.],
                [-1., -1.]])
    """
    rewards, totals, unmeasured = turn_rewards(rollouts, reward, spans, "gigpo")
    of, groups = owners(rollouts, spans), rollouts.trajectory_groups
    if episodes == "trajectory":
        above = above_mean(group_statistics(totals, groups, rollouts.num_groups), scale, ddof, eps)
    else:
        of_turns = above_mean(group_statistics(totals[of], groups[of], rollouts.num_groups), scale, ddof, eps)
        above = torch.zeros_like(totals).scatter_(0, of, of_turns)
    parts = {reward: Signal(above, "trajectory")}
    notes = {"unmeasured_turns": float(unmeasured)}
    if omega:
        returns = timeline(rollouts, spans).returns(rewards, gamma)
        anchors, sizes = _anchor_groups(rollouts, spans)
        stats = group_statistics(torch.where(totals[of].isnan(), torch.nan, returns), anchors, len(sizes))
        parts["state"] = Signal(omega * above_mean(stats, scale, ddof, eps), spans)
        notes |= _sizes(stats.count)
    return assemble(rollouts, measured_mask(rollouts, ~totals.isnan()), parts, notes=notes)


def _anchor_groups(rollouts: Rollouts, spans: str) -> tuple[Tensor, Tensor]:
    """The anchor group of each turn, [S], and how many turns each has."""
    turns = rollouts.spans[spans]
    assert turns.state is not None
    states, state = torch.unique(turns.state, return_inverse=True)
    pair = rollouts.group_ids[turns.row] * len(states) + state
    _, anchors, sizes = torch.unique(pair, return_inverse=True, return_counts=True)
    return anchors, sizes


def _sizes(count: Tensor) -> dict[str, float]:
    """Mean size of the anchor groups, and the share of turns that are alone in theirs."""
    used = count[count > 0]
    return {
        "anchor_group_size": float(used.mean()) if len(used) else 0.0,
        "turns_alone": float((used == 1).sum() / used.sum()) if len(used) else 0.0,
    }
