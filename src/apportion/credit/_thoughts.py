"""Credit from labels of the steps of a thinking response, merged into thoughts (TP-GRPO)."""

import torch
from torch import Tensor

from apportion.credit._base import assemble, estimator, measured_mask, span_values, trajectory_values
from apportion.credit._turns import Timeline, above_mean, owners, timeline
from apportion.functional import at_members, group_statistics, segment_mean
from apportion.types import Credit, Rollouts, Signal


@estimator(requires=("signals.{outcome}", "spans.{spans}", "signals.{label}"), scope="group", needs_group_of=2)
def tp_grpo(
    rollouts: Rollouts,
    *,
    alpha: float = 1.0,
    adaptive: bool = True,
    merge: bool = True,
    threshold: float = 0.5,
    ddof: int = 1,
    eps: float = 1e-6,
    outcome: str = "outcome",
    label: str = "label",
    spans: str = "step",
) -> Credit:
    """GRPO on right and wrong; less on thoughts that a right response took back, nothing on what a wrong answer left.

    `h_i = (o_i - mean) / (std + eps)`, o = +1 if right, else -1; `c = alpha * share of right responses in the group`.
    A right response: h, but `h - c` in incorrect thoughts. A wrong one: h, but 0 in thoughts that its answer did not
    use. Neighbouring steps with equal labels are one thought; what lies outside every step is the answer and keeps h.

    Source: TP-GRPO, arXiv 2507.23317 (later: Smarter Not Harder). The paper's value of alpha is not known to us; the
        default is ours. Departs: a single response gets 0; its code was not available.
    Reads: signals[outcome], signals[label] [S], spans[spans], truncated. Scope: group. Unit: trajectory, plus `spans`.
    Cost: a judge that marks the steps of every response, once per response.
    Laws: correct thoughts, thoughts that the answer used and answers have the GRPO value exactly; cutting a step in
        two with the same label changes nothing.
    Degenerate: all wrong 0; all right h = 0, but incorrect thoughts get `-alpha`; a group with one measured response
        0; an unmeasured label keeps the GRPO value, counted in notes; a truncated response is wrong and each of its
        steps counts as unused; an unmeasured outcome advantage 0 and mask False.

    Args:
        rollouts: the batch.
        alpha: weight of the process reward in right responses; above 0.
        adaptive: times the share of right responses, so that hard prompts are explored; False keeps c = alpha.
        merge: False lets every step pay by itself: each adds +c or -c (+h or -h in wrong responses) to all steps up to
            it. An ablation of the paper; sums grow with the number of steps.
        threshold: an outcome at or above it is right.
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        outcome: signal with one outcome per trajectory.
        label: 1 = the step is correct (in a right response) or used by the answer (in a wrong one), 0 = not.
        spans: the steps of the thinking.

    Raises:
        ValueError: labels other than 0, 1 or NaN; a negative alpha.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3], [4, 5]], [0, 0], outcome=[1.0, 0.0], steps=[[(0, 1), (1, 2)], [(0, 1)]],
        ...     signals={"label": Signal(torch.tensor([1.0, 0.0, 0.0]), "step")})
        >>> tp_grpo(r).advantages
        tensor([[ 0.7071,  0.2071,  0.7071],
                [ 0.0000, -0.7071,  0.0000]])
    """
    if alpha < 0:
        raise ValueError(f"tp_grpo needs an alpha of at least 0; got {alpha:g}. A negative one rewards wrong thoughts.")
    labels = _labels(rollouts, label, spans)
    cut = _cut(rollouts)
    outcomes = trajectory_values(rollouts, outcome, "tp_grpo")
    right = (outcomes >= threshold) & ~cut
    groups, count = rollouts.trajectory_groups, rollouts.num_groups
    stats = group_statistics(torch.where(outcomes.isnan(), torch.nan, right.double() * 2 - 1), groups, count)
    above = above_mean(stats, "std", ddof, eps)
    share = segment_mean(right.double(), stats.ids, count) if adaptive else torch.ones_like(stats.count)
    pay = alpha * at_members(torch.where(stats.count < 2, 0.0, share), stats.ids)
    of, line = owners(rollouts, spans), timeline(rollouts, spans)
    stake = torch.where(right, pay, above)[of]
    good = torch.where(cut[of], 0.0, labels)
    if merge:
        process = torch.where(good == 0, -stake, 0.0)
    else:
        process = line.returns(torch.where(good.isnan(), 0.0, (2 * good - 1) * stake), 1.0)
    parts = {outcome: Signal(above, "trajectory"), label: Signal(process, spans)}
    notes = {
        "thoughts": float(_thoughts(good, line)),
        "wrong_steps": float((good == 0).double().mean()) if len(good) else 0.0,
        "unlabelled_steps": float(good.isnan().sum()),
        "truncated_responses": float((cut & stats.measured).sum()),
        "right_responses": float(right[stats.measured].double().mean()) if bool(stats.measured.any()) else 0.0,
    }
    return assemble(rollouts, measured_mask(rollouts, stats.measured), parts, notes=notes)


def _labels(rollouts: Rollouts, label: str, spans: str) -> Tensor:
    labels = span_values(rollouts, label, spans, 0, "tp_grpo")
    odd = ~labels.isnan() & (labels != 0) & (labels != 1)
    if bool(odd.any()):
        raise ValueError(
            f"tp_grpo needs labels 0, 1 or NaN in signals[{label!r}]; got {float(labels[odd][0]):g}. "
            "Threshold graded labels first."
        )
    return labels


def _cut(rollouts: Rollouts) -> Tensor:
    """Which trajectories were cut by a limit in their last row, [N]."""
    out = torch.zeros(rollouts.num_trajectories, dtype=torch.bool, device=rollouts.device)
    if rollouts.truncated is None:
        return out
    ids = rollouts.trajectory_ids
    last = torch.zeros_like(ids[: len(out)]).scatter_reduce(0, ids, rollouts.row_index, "amax", include_self=False)
    ended = rollouts.row_index == last[ids]
    out[ids[ended]] = rollouts.truncated[ended]
    return out


def _thoughts(good: Tensor, line: Timeline) -> int:
    """How many runs of steps with equal labels there are."""
    now = good[line.order]
    same = (now[1:] == now[:-1]) | (now[1:].isnan() & now[:-1].isnan())
    return len(now) - int((same & line.goes_on[:-1]).sum())
