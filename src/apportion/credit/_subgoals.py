"""Returns shaped by verdicts on subgoals (CALM)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import assemble, estimator, measured_mask
from apportion.credit._turns import Timeline, timeline, turn_rewards
from apportion.functional import segment_min
from apportion.types import Credit, Rollouts, Signal

Mode = Literal["once", "every", "potential"]


@estimator(requires=("spans.{spans}", "signals.{reward}", "signals.{verdicts}"), laws=("linear",))
def calm(
    rollouts: Rollouts,
    *,
    mode: Mode = "once",
    lam: float | None = None,
    gamma: float = 1.0,
    verdicts: str = "subgoal",
    reward: str = "turn_reward",
    spans: str = "turn",
) -> Credit:
    """The return of each turn, with a bonus where a judge says that the turn achieved a subgoal.

    `A_t = G_t = sum_(k >= t) gamma^(k-t) (r_k + b_k)`, with `b_k` by mode: "once" `lam` for each subgoal whose first
    positive verdict of the episode is at k; "every" `lam sum_j z_(k,j)`; "potential" `lam (gamma n_(k+1) - n_k)`, n_k
    the subgoals achieved before k and n = 0 after the last turn, which adds up to `-lam n_t` from t on.

    Source: CALM, arXiv 2409.12798 (a bonus whenever an option ends; the paper trains no policy). Departs: paying once
        per subgoal and the potential form are ours; so is that a cut episode ends with n = 0, like any other.
    Reads: signals[reward], signals[verdicts] [S, subgoals], spans[spans]. Scope: row. Unit: `spans`.
    Cost: a judge call per turn.
    Laws: `lam=0.0` is the plain return; paid once, the bonus of an episode is at most `lam` per subgoal; without
        verdicts the credit scales with the rewards; potential bonuses of an episode sum to 0 at `gamma=1`.
    Degenerate: no subgoals: the plain return; an unusable verdict (NaN) counts as not achieved, in notes; an
        unmeasured turn reward adds nothing, in notes; a trajectory without any measured turn reward advantage 0 and
        mask False; actions outside every turn decide nothing and leave the mask; a truncated episode keeps what came
        before the cut.

    A return is not a baseline: follow it with one, as in `chain(calm(), whiten(over="group"))`.

    Args:
        rollouts: the batch.
        mode: how achieved subgoals pay. Only "potential" leaves the best policy as it is.
        lam: the bonus of one subgoal; None for 0.1 divided by the number of subgoals. The paper gives none.
        gamma: discount per turn. The paper gives none; the default is ours.
        verdicts: signal with 1 = the turn achieved this subgoal, 0 = not, NaN = unusable.
        reward: signal with one reward per turn, from the environment.
        spans: the turns.

    Raises:
        ValueError: verdicts of another shape, or other than 0, 1 or NaN.

    Example:
        >>> from apportion import Spans
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], spans={"turn": Spans.from_lists([[(0, 1), (1, 2), (2, 3)]])},
        ...     signals={"turn_reward": Signal(torch.tensor([0.0, 0.0, 1.0]), "turn"),
        ...              "subgoal": Signal(torch.tensor([[0.0], [1.0], [1.0]]), "turn", ("subgoals",))})
        >>> calm(r, lam=0.5).advantages
        tensor([[1.5000, 1.5000, 1.0000]])
        >>> calm(r, lam=0.5, mode="every").advantages
        tensor([[2.0000, 2.0000, 1.5000]])
    """
    rewards, totals, unmeasured = turn_rewards(rollouts, reward, spans, "calm")
    said = _verdicts(rollouts, verdicts, spans)
    achieved = said == 1
    each = 0.1 / max(said.shape[1], 1) if lam is None else lam
    line = timeline(rollouts, spans)
    first = _first_time(achieved, line, rollouts.num_trajectories)
    if mode == "potential":
        bonus = -each * _achieved_before(first, line)
    else:
        paid = first if mode == "once" else achieved
        bonus = line.returns(each * paid.sum(1).double(), gamma)
    parts = {reward: Signal(line.returns(rewards, gamma), spans), verdicts: Signal(bonus, spans)}
    mask = measured_mask(rollouts, ~totals.isnan()) & (rollouts.span_ids(spans) >= 0)
    notes = {
        "unmeasured_turns": float(unmeasured),
        "unusable_verdicts": float(said.isnan().sum()),
        "achieved": float(achieved.double().mean()) if achieved.numel() else 0.0,
        "repeated": float((achieved & ~first).sum()),
    }
    return assemble(rollouts, mask, parts, notes=notes)


def _verdicts(rollouts: Rollouts, verdicts: str, spans: str) -> Tensor:
    """The verdicts, checked, [S, subgoals]."""
    signal = rollouts.signals[verdicts]
    if signal.unit != spans or signal.values.dim() != 2:
        raise ValueError(
            f"calm needs signals[{verdicts!r}] with shape [S, subgoals] over spans[{spans!r}]; got unit {signal.unit!r} "
            f"and shape {list(signal.values.shape)}. Give one verdict per turn and subgoal."
        )
    said = signal.values
    odd = ~said.isnan() & (said != 0) & (said != 1)
    if bool(odd.any()):
        raise ValueError(
            f"calm needs verdicts 0, 1 or NaN in signals[{verdicts!r}]; got {float(said[odd][0]):g}. "
            "Threshold graded verdicts first."
        )
    return said


def _first_time(achieved: Tensor, line: Timeline, trajectories: int) -> Tensor:
    """Whether this is the first positive verdict on the subgoal in the trajectory, [S, m]."""
    turns, subgoals = achieved.shape
    achieved = achieved[line.order]
    place = torch.arange(turns, dtype=torch.float64, device=achieved.device)[:, None].expand(turns, subgoals)
    cell = line.owner[:, None] * subgoals + torch.arange(subgoals, device=achieved.device)
    earliest = segment_min(place.reshape(-1), torch.where(achieved, cell, -1).flatten(), trajectories * subgoals)
    return line.back(place == earliest[cell] if subgoals else achieved)


def _achieved_before(first: Tensor, line: Timeline) -> Tensor:
    """How many subgoals of the trajectory were achieved before each turn, [S]."""
    gained = first.sum(1)[line.order]
    before = gained.cumsum(0) - gained
    begins = torch.ones_like(line.goes_on)
    begins[1:] = ~line.goes_on[:-1]
    run = begins.cumsum(0) - 1
    return line.back((before - before[begins][run]).double())
