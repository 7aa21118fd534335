"""Credit on a tree of rollouts: rewards of the leaves fused upward, nodes compared at equal depth (BranchGRPO)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import (
    Estimator,
    Settings,
    alias,
    assemble,
    estimator,
    span_values,
    trajectory_values,
    transform,
)
from apportion.credit._combine import chain
from apportion.credit._transforms import clip
from apportion.functional import (
    at_members,
    group_statistics,
    segment_any,
    segment_count,
    segment_max,
    segment_sum,
    tree_depth,
    tree_sum,
    tree_values,
)
from apportion.types import Credit, Rollouts, Signal

Fusion = Literal["uniform", "path"]
Edge = Literal["mean", "sum"]


def _requires(s: Settings) -> tuple[str, ...]:
    path = ("logprobs",) if s["fusion"] == "path" else ()
    return ("spans.{spans}", "spans.{spans}.parent", "signals.{reward}", *path)


def _laws(s: Settings) -> tuple[str, ...]:
    """Weights of paths may be all but one-hot, so that deviations come near `eps` and below `floor`."""
    scale = ("scale",) if s["fusion"] == "uniform" else ()
    return ("shift", "equal", *(scale if s["scale"] else ("linear",)))


@estimator(requires=_requires, scope="group", needs_group_of=2, laws=_laws)
def tree_relative(
    rollouts: Rollouts,
    *,
    fusion: Fusion = "uniform",
    compare: Literal["depth", "siblings"] = "depth",
    scale: Literal["std"] | None = "std",
    ddof: int = 1,
    eps: float = 1e-8,
    floor: float = 1e-6,
    temperature: float = 1.0,
    edge: Edge = "mean",
    reward: str = "outcome",
    spans: str = "branch",
) -> Credit:
    """The value of each node of a rollout tree above what the other nodes at its depth got.

    `v(leaf) = reward`, `v(n) = sum over children c of w_c v(c)`, `A_n = (v(n) - mean) / (std + eps)` over the nodes of the
    group at the depth of n, with `w_c = leaves below c / leaves below n` ("uniform", the mean over leaves) or
    `w = softmax(edge log-probability / temperature)` over siblings ("path").

    Source: BranchGRPO, arXiv 2509.06040, and its code. Departs: trees grow from a common virtual root, so that a group
        may hold several; log-probabilities of an edge are averaged over its tokens, where the code averages over a latent.
    Reads: signals[reward], spans[spans] with parents, logprobs for `fusion="path"`. Scope: group. Unit: span.
    Cost: a sampler that forks; nothing beyond the rollouts.
    Laws: the advantages of one depth sum to 0; a shift of all rewards changes nothing; which row holds a shared span is
        irrelevant; where every leaf is a child of the root it is GRPO.
    Degenerate: one node at a depth, or a deviation below `floor`, gets 0, so a chain without forks is 0 everywhere; an empty
        span counts as a node; a node without a measured leaf enters no statistic, advantage 0, mask False, as do
        positions in no span.

    Each span is the edge into its node; a shared one stands in one row only. Depth is the number of spans before it on the
    way from the root.

    Args:
        rollouts: the batch.
        fusion: how values go up, over leaves ("uniform") or by the probability of the edges ("path").
        compare: nodes of equal depth in the group ("depth"), or children of one parent ("siblings").
        scale: divide by the deviation of the nodes compared, or not (None).
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        floor: a smaller deviation counts as none.
        temperature: of the softmax over siblings; above 0.
        edge: log-probability of an edge, the mean over its actions or their sum.
        reward: one per trajectory, the reward of its one leaf; or a signal over `spans`, read at the leaves.
        spans: the tree.

    Raises:
        ValueError: a parent that is no span of the same group; a measured trajectory with no leaf, or with several;
            a temperature not above 0.

    Example:
        >>> from dataclasses import replace
        >>> from apportion.types import Spans
        >>> tree = replace(Spans.from_lists([[(0, 1), (1, 2)], [(0, 1)]]), parent=torch.tensor([-1, 0, 0]))
        >>> r = Rollouts.from_lists([[7, 8], [9]], [0, 0], outcome=[1.0, 0.0], spans={"branch": tree})
        >>> tree_relative(r, scale=None).advantages
        tensor([[ 0.0000,  0.5000],
                [-0.5000,  0.0000]])
    """
    if temperature <= 0:
        raise ValueError(
            f"tree_relative needs a temperature above 0; got {temperature:g}. Use fusion='uniform' instead."
        )
    parent = span_parents(rollouts, spans, "tree_relative")
    rewards = _leaf_rewards(rollouts, reward, spans, parent)
    logits = _edge_logprobs(rollouts, spans, edge) / temperature if fusion == "path" else None
    value = tree_values(rewards, parent, logits)
    ids = _depths(rollouts, spans, parent) if compare == "depth" else _siblings(rollouts, spans, parent)
    stats = group_statistics(value, ids, int(ids.max()) + 1 if len(ids) else 0)
    divisor = torch.ones_like(stats.low)
    if scale:
        deviation = stats.spread(ddof, 0.0, "std")
        divisor = torch.where(deviation < floor, torch.inf, deviation + eps)
    advantage = (stats.y - at_members(stats.mean, stats.ids)) / at_members(divisor, stats.ids)
    part = Signal(torch.where(stats.measured, advantage, 0.0), spans)
    mask = rollouts.action_mask & at_members(stats.measured, rollouts.span_ids(spans))
    several = stats.count >= 2
    notes = {
        "nodes": float(stats.measured.sum()),
        "leaves": float((~rewards.isnan()).sum()),
        "unmeasured_nodes": float((~stats.measured).sum()),
        "compared_nodes": float(stats.count[several].sum()),
        "zero_signal_depths": float((several & (stats.flat | divisor.isinf())).sum()) / max(int(several.sum()), 1),
    }
    return assemble(rollouts, mask, {reward: part}, notes=notes)


def span_parents(rollouts: Rollouts, spans: str, needed_by: str) -> Tensor:
    """The parent of each span, [S].

    Raises:
        ValueError: a parent that is no span of the set, or one of another group.
    """
    nodes = rollouts.spans[spans]
    parent = nodes.parent
    assert parent is not None
    if bool((parent >= len(nodes)).any()):
        raise ValueError(
            f"{needed_by} needs parents that are spans of spans[{spans!r}], 0..{len(nodes) - 1}, or -1; "
            f"got {int(parent.max())}. Number the spans of all rows in one line."
        )
    group = rollouts.group_ids[nodes.row]
    stray = (parent >= 0) & (group != at_members(group, parent))
    if bool(stray.any()):
        i = int(stray.nonzero()[0])
        raise ValueError(
            f"{needed_by} needs a tree inside each group; span {i} of spans[{spans!r}] lies in group {int(group[i])} and "
            f"its parent {int(parent[i])} in group {int(group[parent[i]])}. Give a tree one group id."
        )
    return parent


def _leaf_rewards(rollouts: Rollouts, reward: str, spans: str, parent: Tensor) -> Tensor:
    """The reward of each leaf, [S]; NaN at inner nodes and where it was not measured."""
    leaf = segment_count(parent, len(parent)) == 0
    if rollouts.signals[reward].unit == spans:
        return torch.where(leaf, span_values(rollouts, reward, spans, 0, "tree_relative"), torch.nan)
    value = trajectory_values(rollouts, reward, "tree_relative")
    owner = rollouts.trajectory_ids[rollouts.spans[spans].row]
    leaves = segment_count(torch.where(leaf, owner, -1), len(value))
    odd = ~value.isnan() & (segment_count(owner, len(value)) > 0) & (leaves != 1)
    if bool(odd.any()):
        n = int(odd.nonzero()[0])
        raise ValueError(
            f"tree_relative needs one leaf of spans[{spans!r}] in every trajectory with a reward; trajectory {n} has "
            f"{int(leaves[n])}. Give a signal over spans[{spans!r}] with the rewards of the leaves, or NaN for this one."
        )
    return torch.where(leaf, value[owner], torch.nan)


def _edge_logprobs(rollouts: Rollouts, spans: str, edge: Edge) -> Tensor:
    """Log-probability of the actions of each span, their mean or their sum; 0 where it has none."""
    assert rollouts.logprobs is not None
    ids = torch.where(rollouts.action_mask, rollouts.span_ids(spans), -1).flatten()
    count = len(rollouts.spans[spans])
    total = segment_sum(rollouts.logprobs.flatten(), ids, count)
    return total / segment_count(ids, count).clamp(min=1) if edge == "mean" else total


def _depths(rollouts: Rollouts, spans: str, parent: Tensor) -> Tensor:
    """One id for the nodes of a group at one depth."""
    depth = tree_depth(parent)
    deepest = int(depth.max()) + 1 if len(depth) else 0
    return rollouts.group_ids[rollouts.spans[spans].row] * deepest + depth


def _siblings(rollouts: Rollouts, spans: str, parent: Tensor) -> Tensor:
    """One id for the children of a node; the roots of a group are children of a virtual one."""
    return torch.where(parent >= 0, parent, len(parent) + rollouts.group_ids[rollouts.spans[spans].row])


@alias
def branch_grpo(
    *,
    fusion: Fusion = "uniform",
    temperature: float = 1.0,
    edge: Edge = "mean",
    eps: float = 1e-8,
    limit: float = 5.0,
    reward: str = "outcome",
    spans: str = "branch",
) -> Estimator:
    """BranchGRPO: values of leaves fused upward, normalised per depth, and clipped.

    Source: arXiv 2509.06040; uniform fusion is the default of its script, path weights what its text describes.
    Cost: a sampler that forks; nothing beyond the rollouts.

    Example:
        >>> branch_grpo()  # doctest: +NORMALIZE_WHITESPACE
        chain(tree_relative(fusion='uniform', temperature=1.0, edge='mean', eps=1e-08, reward='outcome',
        spans='branch'), clip(limit=5.0))
    """
    relative = tree_relative(fusion=fusion, temperature=temperature, edge=edge, eps=eps, reward=reward, spans=spans)
    return chain(relative, clip(limit=limit))


# ---- pruning ----------------------------------------------------------------------------------------------------------


@transform(requires=("spans.{spans}", "spans.{spans}.parent"), scope="group")
def prune_depth(
    credit: Credit, rollouts: Rollouts, *, first: int = 15, last: int = 18, spans: str = "branch"
) -> Credit:
    """The loss does not count the edges of some depths; their values still shaped everyone's advantage.

    `mask' = mask and not first <= depth <= last`, depth being the number of spans before it on the way from the root.

    Source: BranchGRPO, arXiv 2509.06040, depth pruning; 15 to 18 of 20 is the example of its script.
    Reads: spans[spans] with parents. Scope: group. Unit: token.
    Cost: none.
    Laws: advantages that stay are unchanged.
    Degenerate: positions in no span stay; an empty window is an error.

    Args:
        credit: what to change. rollouts: the batch.
        first: shallowest depth left out.
        last: deepest depth left out.
        spans: the tree.

    Raises:
        ValueError: `first` below 0 or above `last`.

    Example:
        >>> chain(branch_grpo(), prune_depth(first=0, last=1)).requires
        ('spans.branch', 'spans.branch.parent', 'signals.outcome')
    """
    if not 0 <= first <= last:
        raise ValueError(f"prune_depth needs 0 <= first <= last; got {first} and {last}.")
    depth = tree_depth(span_parents(rollouts, spans, "prune_depth"))
    dropped = (depth >= first) & (depth <= last)
    return credit.narrowed(~at_members(dropped, rollouts.span_ids(spans)))


@transform(requires=("spans.{spans}", "spans.{spans}.parent"), scope="group")
def prune_width(
    credit: Credit,
    rollouts: Rollouts,
    *,
    mode: Literal["best", "extremes"] = "best",
    keep: float = 0.5,
    spans: str = "branch",
) -> Credit:
    """Of the edges after the last fork, the loss counts only the best, or the best and the worst.

    Of n edges `max(1, floor(keep n))` stay, those of largest advantage ("best", in each branch of a last fork), or
    `k = max(2, floor(keep n))`: the `floor(k / 2)` largest and the `k - floor(k / 2)` smallest of the group ("extremes").

    Source: BranchGRPO, arXiv 2509.06040, width pruning modes 1 and 2 of its code. Departs: "extremes" compares within a
        group, where the code pools the prompts of a device; the last fork is that of each path, where the code's trees fork
        at fixed steps.
    Reads: spans[spans] with parents. Scope: group. Unit: token.
    Cost: none.
    Laws: advantages that stay are unchanged.
    Degenerate: the edges of a fork itself always stay, as do a tree without a fork and positions in no span; of equal
        advantages the shallower edge comes first. A leaf without a counted position in its trajectory makes no fork.

    An edge's advantage is the largest of its counted tokens.

    Args:
        credit: what to change. rollouts: the batch.
        mode: which edges stay.
        keep: share that stays, above 0 and at most 1.
        spans: the tree.

    Raises:
        ValueError: `keep` outside (0, 1].

    Example:
        >>> prune_width(mode="extremes")
        prune_width(mode='extremes')
    """
    if not 0 < keep <= 1:
        raise ValueError(f"prune_width needs 0 < keep <= 1; got {keep:g}.")
    parent = span_parents(rollouts, spans, "prune_width")
    ids = rollouts.span_ids(spans)
    advantage = segment_max(credit.advantages.flatten(), torch.where(credit.mask, ids, -1).flatten(), len(parent))
    branch = _last_branch(credit, rollouts, spans, parent)
    pool = branch if mode == "best" else rollouts.group_ids[rollouts.spans[spans].row]
    edges = (~advantage.isinf() & (branch >= 0)).nonzero()[:, 0]
    edges = edges[torch.argsort(tree_depth(parent)[edges], stable=True)]
    edges = edges[torch.argsort(-advantage[edges], stable=True)]
    edges = edges[torch.argsort(pool[edges], stable=True)]
    _, pools, sizes = torch.unique_consecutive(pool[edges], return_inverse=True, return_counts=True)
    place = torch.arange(len(edges), device=ids.device) - (sizes.cumsum(0) - sizes)[pools]
    size = sizes[pools]
    most = (size * keep).long().clamp(min=1 if mode == "best" else 2)
    high = most if mode == "best" else most // 2
    stays = (place < high) | (place >= size - (most - high))
    dropped = torch.zeros_like(parent, dtype=torch.bool)
    dropped[edges] = ~stays
    return credit.narrowed(~at_members(dropped, ids))


def _last_branch(credit: Credit, rollouts: Rollouts, spans: str, parent: Tensor) -> Tensor:
    """For each node after the last fork of its path the child of that fork, [S]; -1 for other nodes."""
    row = rollouts.spans[spans].row
    counted = segment_any(credit.mask.any(1), rollouts.trajectory_ids, rollouts.num_trajectories)
    leaf = (segment_count(parent, len(parent)) == 0) & counted[rollouts.trajectory_ids[row]]
    leaves = tree_sum(leaf.double(), torch.ones_like(leaf, dtype=torch.float64), parent)
    forked = segment_sum(leaf.double(), rollouts.group_ids[row], rollouts.num_groups) > 1
    after = (at_members(leaves, parent) == 1) & forked[rollouts.group_ids[row]]
    top = torch.where(after, parent, torch.arange(len(parent), device=parent.device))
    while bool((top[top] != top).any()):
        top = top[top]
    return torch.where(after, top, -1)
