import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import (
    Rollouts,
    Signal,
    Spans,
    branch_grpo,
    chain,
    clip,
    group_relative,
    prune_depth,
    prune_width,
    tree_relative,
)
from reference.batches import random_batch
from reference.loops import blank, deviation, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
PARENT = [-1, 0, 0, 1, 1, 2, 2]
EDGES = [0.0, -1.0, -0.5, -0.2, -1.2, -0.7, -0.7]
ADVANTAGES = [0.0, 0.707107, -0.707107, 1.322043, -0.977162, 0.172440, -0.517321]


def grow(parent, rewards, edges=None, *, owners=None, lengths=None, dtype=torch.float64, groups=None) -> Rollouts:
    """A trajectory per leaf, in the order of the leaves; an inner node lies in the row of `owners`, or of its first leaf."""
    leaves = [n for n in range(len(parent)) if n not in parent]
    lengths, logs = lengths or [1] * len(parent), edges or [0.0] * len(parent)
    path = {}
    for leaf in leaves:
        path[leaf] = [leaf]
        while parent[path[leaf][0]] >= 0:
            path[leaf].insert(0, parent[path[leaf][0]])
    first = {n: next(leaf for leaf in leaves if n in path[leaf]) for n in range(len(parent))}
    first.update(owners or {})
    place = {}
    for row, leaf in enumerate(leaves):
        at = 0
        for n in path[leaf]:
            if first[n] == leaf:
                place[n] = (row, at, at + lengths[n], path[leaf].index(n))
                at += lengths[n]
    columns = torch.tensor([place[n] for n in range(len(parent))]).unbind(1)
    tokens = [[1] * sum(lengths[n] for n in path[leaf] if first[n] == leaf) for leaf in leaves]
    logprobs = [[logs[n] for n in path[leaf] if first[n] == leaf for _ in range(lengths[n])] for leaf in leaves]
    return Rollouts.from_lists(
        tokens,
        groups or [0] * len(leaves),
        outcome=rewards,
        logprobs=logprobs if edges else None,
        spans={"branch": Spans(*columns, parent=torch.tensor(parent))},
        dtype=dtype,
    )


def with_parent(spans: Spans, parent: list[int]) -> Spans:
    return replace(spans, parent=torch.tensor(parent))


def nodes(credit, part="outcome") -> torch.Tensor:
    return credit.parts[part].values


def numbers(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fusion", ["uniform", "path"])
def test_worked_tree(dtype, fusion):
    """Node 1 is worth 0.5 (or 0.73 by its likelier child), node 2 0.35: +-0.7071 whatever the gap."""
    r = grow(PARENT, [1, 0, 0.5, 0.2], EDGES, dtype=dtype)
    credit = branch_grpo(r, fusion=fusion)
    torch.testing.assert_close(nodes(credit), numbers(ADVANTAGES, dtype), **DTYPES[dtype])
    want = [[0.0, 0.707107, 1.322043], [-0.977162, 0, 0], [-0.707107, 0.172440, 0], [-0.517321, 0, 0]]
    torch.testing.assert_close(credit.advantages, numbers(want, dtype), **DTYPES[dtype])
    assert nodes(credit, "clip").abs().max() == 0


def test_values_show_without_the_deviation():
    r = grow(PARENT, [1, 0, 0.5, 0.2], EDGES)
    uniform, path = (nodes(tree_relative(r, scale=None, fusion=f)) for f in ("uniform", "path"))
    torch.testing.assert_close(uniform[:3], numbers([0, 0.075, -0.075]))
    gap = (0.731059 - 0.35) / 2
    torch.testing.assert_close(path[:3], numbers([0, gap, -gap]), rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_which_row_holds_a_shared_span_is_irrelevant(seed):
    rng = random.Random(seed)
    owners = {0: rng.choice([3, 4, 5, 6]), 1: rng.choice([3, 4]), 2: rng.choice([5, 6])}
    lengths = [rng.randint(0, 3) for _ in PARENT]
    for fusion in ("uniform", "path"):
        r = grow(PARENT, [1, 0, 0.5, 0.2], EDGES, owners=owners, lengths=lengths)
        edges = [e if n else 0.0 for e, n in zip(EDGES, lengths, strict=True)]
        plain = grow(PARENT, [1, 0, 0.5, 0.2], edges)
        torch.testing.assert_close(nodes(branch_grpo(r, fusion=fusion)), nodes(branch_grpo(plain, fusion=fusion)))


def test_a_star_is_grpo_and_a_chain_is_nothing():
    star = grow([-1, -1, -1], [1, 0, 0.3])
    torch.testing.assert_close(branch_grpo(star).advantages, group_relative(star, eps=1e-8).advantages)
    trunk = grow([-1, 0, 0, 0], [1, 0, 0.3])
    torch.testing.assert_close(nodes(branch_grpo(trunk))[1:], nodes(branch_grpo(star)))
    line = grow([-1, 0, 1], [1])
    credit = branch_grpo(line)
    assert (credit.advantages == 0).all()
    assert credit.mask.all()


def test_a_single_child_passes_its_value_on():
    """The decisive fork is at the second span; the spans behind it carry its credit forward."""
    credit = tree_relative(grow([-1, 0, 0, 1, 2, 3, 4], [1, 0]))
    torch.testing.assert_close(nodes(credit), numbers([0, *[0.5**0.5, -(0.5**0.5)] * 3]), rtol=0, atol=2e-8)


def test_uniform_fusion_averages_leaves_not_children():
    """Below the root stand a leaf worth 1 and a node with three leaves worth 0, 0 and 1: 2/4, not (1 + 1/3)/2."""
    parent = [-1, -1, 0, 0, 1, 1, 1]
    r = grow(parent, [1, 1, 0, 0, 1])
    torch.testing.assert_close(nodes(tree_relative(r, scale=None))[:2], numbers([1 / 3, -1 / 3]))
    under = grow([-1, -1, 0, 1, 1, 3, 3, 3], [0, 1, 1, 0, 0])
    assert nodes(tree_relative(under, scale=None))[1] == pytest.approx(0.5 / 2)


def test_equal_edges_of_a_balanced_tree_make_both_fusions_agree():
    r = grow(PARENT, [1, 0, 0.5, 0.2], [-0.3] * 7)
    torch.testing.assert_close(nodes(branch_grpo(r, fusion="path")), nodes(branch_grpo(r)))


def test_mean_sum_and_temperature_of_the_edges():
    """Edges of 1 and 3 tokens at -1 each: equal means, sums 2 apart; temperature 2 halves that."""
    parent, rewards = [-1, -1, 0, 0, 1], [1, 0, 0]
    r = grow(parent, rewards, [-1.0] * 5, lengths=[1, 1, 1, 3, 1])
    for settings_, value in [
        ({"edge": "mean"}, 0.5),
        ({"edge": "sum"}, 1 / (1 + math.exp(-2))),
        ({"edge": "sum", "temperature": 2.0}, 1 / (1 + math.exp(-1))),
    ]:
        got = nodes(tree_relative(r, fusion="path", scale=None, **settings_))[0]
        assert float(got) == pytest.approx(value / 2), settings_


def test_ragged_trees_compare_early_leaves_with_inner_nodes():
    """A leaf worth 1 at depth 1 beside a node worth 0.25."""
    r = grow([-1, 0, 0, 2, 2], [1, 0.5, 0])
    got = nodes(tree_relative(r, scale=None))
    torch.testing.assert_close(got, numbers([0, 0.375, -0.375, 0.25, -0.25]))


def test_depths_sum_to_zero_and_a_shift_or_a_scale_changes_nothing():
    r = grow(PARENT, [1, 0, 0.5, 0.2])
    got = nodes(tree_relative(r))
    for depth in ([0], [1, 2], [3, 4, 5, 6]):
        assert float(got[depth].sum()) == pytest.approx(0, abs=1e-12)
    moved = grow(PARENT, [3 * x - 7 for x in (1, 0, 0.5, 0.2)])
    torch.testing.assert_close(nodes(tree_relative(moved)), got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rewards", [[0.99] * 4, [0.1] * 4, [0.5, 0.5 + 4e-7, 0.5, 0.5]])
def test_equal_rewards_and_tiny_deviations_give_exactly_nothing(rewards):
    assert (branch_grpo(grow(PARENT, rewards)).advantages == 0).all()
    assert branch_grpo(grow(PARENT, rewards)).notes["zero_signal_depths"] == 1


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("fusion", ["uniform", "path"])
def test_equal_rewards_give_exactly_nothing_without_the_deviation_too(value, fusion):
    """Three tenths over three are not a tenth in floating point, and node 1 has three leaves."""
    r = grow([-1, 0, 0, 1, 1, 1], [value] * 4, [-0.1 * k for k in range(6)])
    assert (tree_relative(r, scale=None, fusion=fusion).advantages == 0).all()
    assert (tree_relative(r, scale=None, fusion=fusion, compare="siblings").advantages == 0).all()


def test_a_decisive_fork():
    """All that matters is decided at the first fork; noise-free forks behind it.

    Compared below one parent the fork alone is credited; compared at equal depth the edges behind it carry the credit on,
    and with the sample deviation they carry more, as there are more of them.
    """
    r = grow(PARENT, [1, 1, 0, 0])
    half, late = 0.5**0.5, 0.75**0.5
    alone = nodes(tree_relative(r, compare="siblings"))
    torch.testing.assert_close(alone, numbers([0, half, -half, 0, 0, 0, 0]), rtol=0, atol=1e-7)
    carried = nodes(branch_grpo(r))
    torch.testing.assert_close(carried, numbers([0, half, -half, late, late, -late, -late]), rtol=0, atol=1e-7)
    plain = nodes(tree_relative(r, scale=None))
    torch.testing.assert_close(plain, numbers([0, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5]))


def test_the_clip_is_a_part():
    """One of 30 leaves: (1 - 1/30) / deviation = 5.29, above the limit of 5."""
    r = grow([-1] * 30, [1.0] + [0.0] * 29)
    credit = branch_grpo(r)
    assert float(credit.advantages[0, 0]) == 5
    assert float(nodes(credit, "clip")[0, 0]) == pytest.approx(5 - math.sqrt(29 * 29 / 30))
    assert float(tree_relative(r).advantages[0, 0]) == pytest.approx(math.sqrt(29 * 29 / 30))


def test_siblings_are_compared_below_one_parent():
    got = nodes(tree_relative(grow(PARENT, [1, 0, 0.5, 0.2]), compare="siblings", scale=None))
    torch.testing.assert_close(got, numbers([0, 0.075, -0.075, 0.5, -0.5, 0.15, -0.15]))
    star = grow([-1, -1, -1], [1, 0, 0.3])
    assert torch.equal(
        tree_relative(star, compare="siblings").advantages, tree_relative(star, compare="depth").advantages
    )


def test_an_unmeasured_leaf_is_as_if_it_were_not_there():
    """The row of the unmeasured leaf also holds the trunk: its trunk is trained, its own edge is not."""
    r = grow(PARENT, [NAN, 0, 0.5, 0.2], EDGES)
    credit, without = branch_grpo(r, fusion="path"), branch_grpo(grow([-1, 0, 0, 1, 2, 2], [0, 0.5, 0.2], EDGES))
    torch.testing.assert_close(nodes(credit)[[0, 1, 2, 4, 5, 6]], nodes(without))
    assert credit.mask.tolist()[0] == [True, True, False]
    assert credit.mask[1:].sum() == 4
    assert credit.notes["unmeasured_nodes"] == 1
    whole = branch_grpo(grow(PARENT, [NAN, NAN, 0.5, 0.2]))
    assert whole.mask.sum() == 4, "node 1 has no measured leaf; the trunk has"


def test_groups_and_the_roots_of_a_group():
    """Two trees in two groups are two comparisons; in one group their roots are children of one virtual root."""
    parent, rewards = [-1, -1, 0, 0, 1, 1], [1, 0, 0.5, 0.2]
    apart = tree_relative(grow(parent, rewards, groups=[0, 0, 1, 1]))
    together = tree_relative(grow(parent, rewards))
    root = 0.5**0.5
    torch.testing.assert_close(nodes(apart), numbers([0, 0, root, -root, root, -root]), rtol=0, atol=1e-7)
    torch.testing.assert_close(nodes(together), numbers([root, -root, *ADVANTAGES[3:]]), rtol=0, atol=5.1e-7)


def test_a_whole_tree_in_one_row_with_rewards_of_the_leaves():
    spans = with_parent(Spans.from_lists([[(t, t + 1) for t in range(7)]]), PARENT)
    reward = Signal(numbers([9, 9, 9, 1, 0, 0.5, 0.2]), "branch")
    r = Rollouts.from_lists([[1] * 8], [0], spans={"branch": spans}, signals={"leaf_reward": reward})
    credit = branch_grpo(r, reward="leaf_reward")
    torch.testing.assert_close(credit.advantages[0, :7], numbers(ADVANTAGES), rtol=0, atol=5.1e-7)
    assert credit.mask.tolist() == [[True] * 7 + [False]], "the last position is in no span"


def test_messages():
    r = grow(PARENT, [1, 0, 0.5, 0.2], EDGES)
    for leaves, rows in ((2, [[(0, 1), (1, 2), (2, 3)], []]), (0, [[(0, 1)], [(0, 1), (1, 2)]])):
        spans = with_parent(Spans.from_lists(rows), [-1, 0, 0])
        two = Rollouts.from_lists([[1] * 3, [1] * 3], [0, 0], outcome=[1, 0], spans={"branch": spans})
        with pytest.raises(
            ValueError, match=f"one leaf of .* every trajectory with a reward; trajectory 0 has {leaves}"
        ):
            tree_relative(two)
    with pytest.raises(ValueError, match=r"needs parents that are spans of spans\['branch'\], 0\.\.6, or -1; got 7"):
        tree_relative(r.with_spans(branch=with_parent(r.spans["branch"], [-1, 0, 0, 1, 1, 2, 7])))
    with pytest.raises(ValueError, match=r"needs a tree inside each group; span 4 .* lies in group 1 and its parent 0"):
        tree_relative(grow([-1, -1, 0, 0, 0, 1], [1, 0, 0.5, 0.2], groups=[0, 0, 1, 1]))
    with pytest.raises(ValueError, match="parents go round in a circle"):
        tree_relative(r.with_spans(branch=with_parent(r.spans["branch"], [1, 0, -1, 1, 1, 2, 2])))
    with pytest.raises(ValueError, match="needs a temperature above 0; got 0"):
        tree_relative(r, temperature=0.0)
    with pytest.raises(ValueError, match=r"needs rollouts\.logprobs"):
        tree_relative(grow(PARENT, [1, 0, 0.5, 0.2]), fusion="path")
    for wrong in ({"first": -1}, {"first": 3, "last": 2}):
        with pytest.raises(ValueError, match="prune_depth needs 0 <= first <= last"):
            chain(tree_relative(), prune_depth(**wrong))(r)
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match="prune_width needs 0 < keep <= 1"):
            chain(tree_relative(), prune_width(keep=keep))(r)


# ---- pruning ----------------------------------------------------------------------------------------------------------


def kept(r, *transforms) -> list[int]:
    """Which nodes are still counted; those that are have the advantage they had."""
    before, after = tree_relative(r), chain(tree_relative(), *transforms)(r)
    assert torch.equal(after.advantages, torch.where(after.mask, before.advantages, 0.0))
    ids = r.span_ids("branch")
    return sorted(ids[after.mask].unique().tolist())


# Two forks: 0 -> 1, 2; then 1 -> 3, 4 and 2 -> 5, 6; behind each leaf branch two more spans: 3 -> 7 -> 11 and so on.
DEEP = [*PARENT, 3, 4, 5, 6, 7, 8, 9, 10]
REWARDS = [1.0, 0.0, 0.5, 0.2]


def test_depth_pruning_drops_a_window():
    r = grow(DEEP, REWARDS)
    assert kept(r, prune_depth()) == list(range(15))
    assert kept(r, prune_depth(first=1, last=2)) == [0, 7, 8, 9, 10, 11, 12, 13, 14]
    assert kept(r, prune_depth(first=0, last=9)) == []


def test_width_pruning_keeps_the_better_half_of_each_last_branch():
    """All edges of a branch have one leaf and, as depths are alike, one advantage: the shallower ones stay."""
    r = grow(DEEP, REWARDS)
    assert kept(r, prune_width()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert kept(r, prune_width(keep=1.0)) == list(range(15))
    assert kept(r, prune_width(keep=0.01)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "one of each at least"
    longer = grow([-1, 0, 0, 1, 3, 4, 2, 6, 7], [1, 0])
    assert kept(longer, prune_width(keep=0.7)) == [0, 1, 2, 3, 4, 6, 7], "2 of 3"


def test_width_pruning_keeps_the_extremes_of_the_tree():
    """Eight edges behind the last forks, worth 1, 0.5, 0.2, 0, twice each: the best two and the worst two stay."""
    r = grow(DEEP, REWARDS)
    assert kept(r, prune_width(mode="extremes")) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12]
    assert kept(r, prune_width(mode="extremes", keep=0.01)) == [0, 1, 2, 3, 4, 5, 6, 7, 12], "two at least"
    assert kept(r, prune_width(mode="extremes", keep=0.4)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12], "1 best, 2 worst of 3"
    assert kept(r, prune_width(mode="extremes", keep=1.0)) == list(range(15))


def test_width_pruning_without_a_fork_and_of_a_ragged_tree():
    assert kept(grow([-1, 0, 1, 2], [1]), prune_width()) == [0, 1, 2, 3]
    forest = grow([-1, -1, 0, 1, 2, 3], [1, 0])
    assert kept(forest, prune_width()) == [0, 1, 2, 3], "roots of one group are a fork"
    ragged = grow([-1, 0, 0, 2, 2, 1, 5, 3, 7], [0, 0.3, 1])
    assert kept(ragged, prune_width()) == [0, 1, 2, 3, 4, 5, 7], (
        "1 -> 5 -> 6 is behind the first fork, 3 -> 7 -> 8 the second"
    )


def test_an_unmeasured_leaf_makes_no_fork():
    """Without the second leaf the spans 3, 7, 11 are behind node 1; so 1 of the fork stays and the better half of four."""
    r = grow(DEEP, [1, NAN, 0.5, 0.2])
    assert kept(r, prune_width()) == [0, 1, 2, 3, 5, 6, 9, 10]


# ---- a slow reference --------------------------------------------------------------------------------------------------


def reference(r: Rollouts, fusion="uniform", compare="depth", scale="std", edge="mean", limit=None) -> torch.Tensor:
    s = r.spans["branch"]
    parent = s.parent.tolist()
    inside = [
        [(int(s.row[n]), t) for t in range(int(s.start[n]), int(s.stop[n])) if r.action_mask[int(s.row[n]), t]]
        for n in range(len(s))
    ]
    group = [int(r.group_ids[s.row[n]]) for n in range(len(s))]
    outcome = [float(r.signals["outcome"].values[r.trajectory_ids[s.row[n]]]) for n in range(len(s))]
    depth = [ancestors(parent, n) for n in range(len(s))]

    def children(n):
        return [c for c, p in enumerate(parent) if p == n]

    def leaves(n):
        if not children(n):
            return [] if math.isnan(outcome[n]) else [outcome[n]]
        return [x for c in children(n) for x in leaves(c)]

    def logit(n):
        each = [float(r.logprobs[at]) for at in inside[n]]
        return math.fsum(each) if edge == "sum" else mean(each)

    def value(n):
        below = [c for c in children(n) if leaves(c)]
        if fusion == "uniform" or not below:
            return mean(leaves(n))
        weights = [math.exp(logit(c)) for c in below]
        return math.fsum(w * value(c) for w, c in zip(weights, below, strict=True)) / math.fsum(weights)

    table = blank(r)
    measured = [n for n in range(len(s)) if leaves(n)]
    for n in measured:
        if compare == "depth":
            pool = [value(k) for k in measured if group[k] == group[n] and depth[k] == depth[n]]
        else:
            pool = [value(k) for k in measured if group[k] == group[n] and parent[k] == parent[n]]
        above = value(n) - mean(pool)
        if scale:
            above = 0.0 if deviation(pool) < 1e-6 else above / (deviation(pool) + 1e-8)
        above = max(-limit, min(limit, above)) if limit else above
        put(table, inside[n], [above] * len(inside[n]))
    return table_of(table, r)


def ancestors(parent: list[int], n: int) -> int:
    return 0 if parent[n] < 0 else 1 + ancestors(parent, parent[n])


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_agrees_with_the_slow_reference(seed):
    r = random_batch(seed)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(branch_grpo(r).advantages, reference(r, limit=5.0), **close)
    torch.testing.assert_close(branch_grpo(r, fusion="path").advantages, reference(r, fusion="path"), **close)
    got = tree_relative(r, fusion="path", edge="sum", compare="siblings", scale=None).advantages
    torch.testing.assert_close(got, reference(r, "path", "siblings", None, "sum"), **close)
    assert torch.equal(chain(tree_relative(), clip(limit=5.0))(r).advantages, branch_grpo(r).advantages)
