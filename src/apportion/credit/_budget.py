"""Credit at several thinking budgets: each cut of the thinking was answered and scored (BRPO)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.credit._base import Settings, assemble, estimator, span_values
from apportion.credit._tree import span_parents
from apportion.functional import at_members, group_statistics, segment_max
from apportion.types import Credit, Rollouts, Signal

Prior = Literal["uniform", "linear", "base"]


def _laws(s: Settings) -> tuple[str, ...]:
    return ("linear",) if s["singleton"] == "raw" else ("shift", "equal", "linear")


@estimator(
    requires=("spans.{spans}", "spans.{spans}.parent", "signals.{score}"), scope="group", needs_group_of=1, laws=_laws
)
def brpo(
    rollouts: Rollouts,
    *,
    prior: Prior | tuple[float, ...] = "uniform",
    budgets: int | None = None,
    decay: float = 0.5,
    single: Literal["group", "zero"] = "group",
    singleton: Literal["own", "raw"] = "own",
    score: str = "score",
    spans: str = "budget",
) -> Credit:
    """Scores still to come, weighed by a prior over budgets, above own earlier scores and the group's mean.

    With q_j the mean score of the summaries at budget j of m, `R_s = sum over j >= s of p_j q_j`,
    `V1_s = P_s (sum over j < s of decay^(s-1-j) q_j) / (sum of these weights)`, `V2_s = mean of R_s in the group`:
    `A_s = R_s - ((s-1) V1_s + (m-s+1) V2_s) / m` on segment s of the thinking, `x - q_j` on a summary at budget j with
    score x.

    Source: BRPO, arXiv 2505.13438, and its code. Departs: where thinking ended early all later budgets see the mean of
        the summaries made at the end, where the code deals these out among the budgets; a group of one, see `singleton`.
    Reads: signals[score], spans[spans] with parents. Scope: group. Unit: span.
    Cost: several short summaries per rollout at every budget, each scored.
    Laws: the part `group` sums to 0 over the group's trajectories at every segment; a factor on the prior changes
        nothing; a constant added to all scores changes nothing; one budget makes it the mean-centred GRPO.
    Degenerate: equal scores 0; an unmeasured summary advantage 0, mask False, counted in notes; a budget without a measured
        summary leaves the segments before it (those whose R needs it) with advantage 0, mask False, and out of V2; empty
        thinking trains its summaries alone; positions in no span mask False.

    Thinking segments are roots, their `index` is the number of their budget from 0; a summary is the child of the segment
    after which it was sampled, in any row of the trajectory. Forced text between them belongs in no span. Thinking that
    ended by itself has fewer segments: later budgets are scored by the summaries of its last one. Scores of thinking
    segments are not read.

    Args:
        rollouts: the batch.
        prior: weight of the budgets: equal, proportional to the budget (equally spaced), all on the last, or one each.
        budgets: m; None for the longest thinking of the group, which is too few where all of a group ended early.
        decay: weight of an earlier score against the one after it, 0 or more.
        single: baseline of the only summary at its budget: the group's mean score there, or itself ("zero").
        singleton: in a group of one, own earlier scores alone are the baseline ("own": nothing for the first segment), or
            V2 is 0 ("raw", as in the released code).
        score: signal over `spans`.
        spans: thinking segments and summaries.

    Raises:
        ValueError: a summary's parent is no thinking segment of its trajectory; a segment beyond the last budget; a prior
            that is negative, all 0, or not one number per budget.

    Example:
        >>> from dataclasses import replace
        >>> from apportion.types import Spans
        >>> cut = replace(Spans.from_lists([[(0, 1), (1, 2)], [(0, 1), (1, 2)]]), parent=torch.tensor([-1, 0, -1, 2]))
        >>> cut = replace(cut, index=torch.zeros(4, dtype=torch.int64))
        >>> score = Signal(torch.tensor([torch.nan, 1.0, torch.nan, 0.0]), "budget")
        >>> r = Rollouts.from_lists([[1, 2], [1, 3]], [0, 0], spans={"budget": cut}, signals={"score": score})
        >>> brpo(r).advantages
        tensor([[ 0.5000,  0.5000],
                [-0.5000, -0.5000]])
    """
    if decay < 0:
        raise ValueError(f"brpo needs a decay of 0 or more; got {decay:g}.")
    cuts = _cuts(rollouts, spans, prior, budgets)
    scores = torch.where(cuts.thinking, torch.nan, span_values(rollouts, score, spans, 0, "brpo"))
    pool = group_statistics(scores, cuts.cell, cuts.prior.numel())
    mean = torch.where(pool.count > 0, pool.low + pool.mean, torch.nan).view(cuts.prior.shape)
    unscored = cuts.reached & mean.isnan()
    mean = mean.gather(1, cuts.seen_as)
    if singleton == "own":  # above the group's smallest, so that equal scores give exactly 0
        level = group_statistics(mean.flatten(), cuts.mates // mean.shape[1], rollouts.num_groups)
        mean = torch.where(mean.isnan(), torch.nan, level.y.view(mean.shape))
    to_come = _suffix_sum(torch.where(cuts.prior > 0, cuts.prior * mean, 0.0))
    group, own = _above(to_come, mean, cuts, decay, singleton)
    summary = pool.y - at_members(pool.mean, pool.ids)
    if single == "group":
        others = group_statistics(mean.flatten(), cuts.mates, cuts.mates_count)
        above = others.y - at_members(others.mean, others.ids)
        summary = torch.where(at_members(pool.count, pool.ids) == 1, above[cuts.cell], summary)
    measured = torch.where(cuts.thinking, ~to_come.isnan().flatten()[cuts.cell], pool.measured)
    parts = {
        "group": Signal(torch.where(cuts.thinking & measured, group.flatten()[cuts.cell], 0.0), spans),
        "own": Signal(torch.where(cuts.thinking & measured, own.flatten()[cuts.cell], 0.0), spans),
        "summary": Signal(torch.where(pool.measured, summary, 0.0), spans),
    }
    notes = {
        "budgets": float(cuts.prior.shape[1]),
        "ended_early": float(cuts.ended_early.double().mean()) if len(mean) else 0.0,
        "unmeasured_summaries": float((~cuts.thinking & ~pool.measured).sum()),
        "unmeasured_budgets": float(unscored.sum()),
    }
    mask = rollouts.action_mask & at_members(measured, rollouts.span_ids(spans))
    return assemble(rollouts, mask, parts, notes=notes)


@dataclass(frozen=True)
class _Cuts:
    """The spans of a batch as tables of `M` budgets for each trajectory.

    Args:
        thinking: which spans are thinking segments, [S].
        cell: the entry of each span in a flattened table: its trajectory, its segment's budget, [S].
        prior: weight of the budgets, summing to 1 in each row, 0 beyond the group's m, [N, M].
        earlier: (s - 1) / m, the share of the baseline that own earlier scores have, [N, M].
        seen_as: which budget's summaries speak for each budget: itself, or the last one reached, [N, M].
        reached: the budgets that have a segment, [N, M]. ended_early: fewer segments than budgets, [N].
        mates: what is compared with each other in a flattened table: group and budget, [N * M]; `mates_count` of them.
    """

    thinking: Bool[Tensor, " S"]
    cell: Int[Tensor, " S"]
    prior: Float[Tensor, "N M"]
    earlier: Float[Tensor, "N M"]
    seen_as: Int[Tensor, "N M"]
    reached: Bool[Tensor, "N M"]
    ended_early: Bool[Tensor, " N"]
    mates: Int[Tensor, " NM"]
    mates_count: int


def _cuts(rollouts: Rollouts, spans: str, prior: Prior | tuple[float, ...], budgets: int | None) -> _Cuts:
    parent = span_parents(rollouts, spans, "brpo")
    cut = rollouts.spans[spans]
    thinking, owner, groups = parent < 0, rollouts.trajectory_ids[cut.row], rollouts.trajectory_groups
    _check_summaries(parent, owner, spans)
    budget = torch.where(thinking, cut.index, at_members(cut.index, parent))
    longest = segment_max(budget.double(), rollouts.group_ids[cut.row], rollouts.num_groups).clamp(min=0).long() + 1
    count = _budget_counts(longest, prior, budgets, spans)[groups]
    width = int(count.max()) if len(count) else 1
    place = torch.arange(width, device=rollouts.device)
    last = segment_max(budget.double(), owner, len(groups)).clamp(min=0).long()
    return _Cuts(
        thinking,
        owner * width + budget,
        _prior_weights(prior, count, place),
        place / count[:, None].double(),
        place.minimum(last[:, None]),
        place <= last[:, None],
        last + 1 < count,
        (groups[:, None] * width + place).flatten(),
        rollouts.num_groups * width,
    )


def _check_summaries(parent: Tensor, owner: Tensor, spans: str) -> None:
    odd = (parent >= 0) & ((at_members(parent, parent) >= 0) | (at_members(owner, parent) != owner))
    if bool(odd.any()):
        i = int(odd.nonzero()[0])
        raise ValueError(
            f"brpo needs the parent of a summary to be a thinking segment (parent -1) of the same trajectory; span {i} of "
            f"spans[{spans!r}] has parent {int(parent[i])}. Name the segment after which it was sampled."
        )


def _budget_counts(longest: Tensor, prior: Prior | tuple[float, ...], budgets: int | None, spans: str) -> Tensor:
    """m of each group, [G]."""
    given = budgets if isinstance(prior, str) else len(prior)
    if budgets is not None and budgets != given:
        raise ValueError(f"brpo got a prior over {given} budgets and budgets={budgets}. Give one weight per budget.")
    if given is None:
        return longest
    if given < 1 or bool((longest > given).any()):
        raise ValueError(
            f"brpo has {given} budgets, but spans[{spans!r}] goes up to index {int(longest.max()) - 1}. "
            "Give as many budgets as the thinking was cut at, the full length included."
        )
    return torch.full_like(longest, given)


def _prior_weights(prior: Prior | tuple[float, ...], count: Tensor, place: Tensor) -> Tensor:
    """Weight of each budget, [N, M]."""
    if isinstance(prior, str):
        shape = {"uniform": torch.ones_like(place), "linear": place + 1, "base": place == count[:, None] - 1}[prior]
    else:
        shape = torch.tensor(prior, dtype=torch.float64, device=place.device)[place]
        if min(prior) < 0 or max(prior) == 0:
            raise ValueError(f"brpo needs a prior of weights of 0 or more, not all 0; got {prior}.")
    weight = torch.where(place < count[:, None], shape.double(), 0.0)
    return weight / weight.sum(1, keepdim=True)


def _suffix_sum(table: Tensor) -> Tensor:
    """Sum of each row from each column on."""
    return table.flip(1).cumsum(1).flip(1)


def _above(
    to_come: Tensor, mean: Tensor, cuts: _Cuts, decay: float, singleton: Literal["own", "raw"]
) -> tuple[Tensor, Tensor]:
    """What each segment's scores to come are above the group's and above own earlier ones, by the share of each."""
    place = torch.arange(mean.shape[1], device=mean.device)
    lag = place[:, None] - 1 - place
    decayed = torch.where(lag >= 0, decay ** lag.clamp(min=0).double(), 0.0)
    scored = ~mean.isnan()
    total, weight = torch.where(scored, mean, 0.0) @ decayed.T, scored.double() @ decayed.T
    stats = group_statistics(to_come.flatten(), cuts.mates, cuts.mates_count)
    above = (stats.y - at_members(stats.mean, stats.ids)).view(mean.shape)
    alone = (at_members(stats.count, stats.ids) == 1).view(mean.shape)
    share = torch.where(weight > 0, cuts.earlier, 0.0)
    if singleton == "raw":
        above = torch.where(alone, to_come, above)
    else:
        share = torch.where(alone & (weight > 0), 1.0, share)
    progress = _suffix_sum(cuts.prior) * (total / weight)
    return (1 - share) * above, torch.where(share > 0, share * (to_come - progress), 0.0)
