"""BranchGRPO: where paths share their beginnings, advantages made depth by depth beat one advantage for a whole path."""

from dataclasses import replace

import torch
from torch import Tensor

from apportion.arena._learning import mean_interval
from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, Verdict
from apportion.arena.worlds.denoising import Denoising
from apportion.credit import assemble, branch_grpo, estimator, grpo, tree_relative
from apportion.functional import tree_sum, tree_values
from apportion.types import Credit, Rollouts, Signal, Spans

_TREE = 16  # rollouts
_WORLDS = {"early forks": Denoising(forks=(0.25, 0.5)), "late forks": Denoising(forks=(0.5, 0.75))}
"""Both trees begin with 4 paths and end with 16; they take the steps of 11 and of 8 independent paths."""


def branch_grpo_beats_uniform(quick: bool = False) -> Claim:
    """BranchGRPO on trees of 16 paths less one GRPO advantage for every step of a path, on the denoising toy.

    Two baselines: the same trees, where a shared step has the mean advantage of the paths through it; and independent paths
    that take as many steps as the tree. Measured are rank and the gradient's cosine. A loss may count a shared step once, as
    BranchGRPO does, or once for every path through it; on the same trees both are taken, against independent paths the
    first. Rule, over early and late forks: shown if all numbers are above 0, contradicted if all are below, else not shown.
    Siblings compared, aim and signal-to-noise are reported and decide nothing.
    """
    decisive: dict[str, Estimate] = {}
    others: dict[str, Estimate] = {}
    for name, world in _WORLDS.items():
        yardstick = Yardstick(world.episodes(128 if quick else 512, _TREE, seed=4))
        r = yardstick.episodes.rollouts
        depths, uniform = branch_grpo(r), along_paths()(r)
        each = yardstick.difference(depths, uniform)
        once = yardstick.difference(counted_once(r, depths), counted_once(r, uniform))
        siblings = yardstick.difference(tree_relative(r, compare="siblings", scale=None), uniform)
        decisive |= {
            f"rank over uniform, {name}": each["rank"],
            f"cosine over uniform, counted once, {name}": once["cosine"],
            f"cosine over uniform, counted for every path, {name}": each["cosine"],
            **{f"{x} over independent paths, {name}": y for x, y in _independent(world, 4 if quick else 20).items()},
        }
        others |= {f"{x} over uniform, counted once, {name}": once[x] for x in ("aim", "snr")}
        others |= {f"{x} over uniform, counted for every path, {name}": each[x] for x in ("aim", "snr")}
        others |= {
            f"{x} of siblings over uniform, counted for every path, {name}": siblings[x] for x in ("rank", "cosine")
        }
    return Claim(
        method="branch_grpo",
        source="arXiv 2509.06040",
        says="On trees of denoising paths, advantages normalised depth by depth are righter than one advantage for all "
        "steps of a path.",
        verdict=_verdict(*decisive.values()),
        numbers=decisive | others,
        because=f"On the same trees rank changes by {_both(decisive, 'rank over uniform')} with early and late forks, the "
        f"gradient's cosine by {_both(decisive, 'cosine over uniform, counted once')} with shared steps counted once and by "
        f"{_both(decisive, 'cosine over uniform, counted for every path')} counted for every path; over independent paths of "
        f"as many steps by {_both(decisive, 'rank over independent paths')} and "
        f"{_both(decisive, 'cosine over independent paths')}.",
    )


@estimator(requires=("spans.branch", "spans.branch.parent", "signals.outcome"), scope="group", needs_group_of=2)
def along_paths(rollouts: Rollouts) -> Credit:
    """GRPO on a tree: every path its one advantage, and a step shared by several the mean of theirs.

    Reads: signals.outcome, spans.branch with parents. Scope: group. Unit: branch.
    """
    spans = rollouts.spans["branch"]
    assert spans.parent is not None
    of_path = grpo()(rollouts).parts["outcome"].values.double()
    at_leaves = torch.where(_leaf(spans), of_path[rollouts.trajectory_ids[spans.row]], torch.nan)
    return assemble(rollouts, rollouts.action_mask, {"outcome": Signal(tree_values(at_leaves, spans.parent), "branch")})


def counted_once(rollouts: Rollouts, credit: Credit) -> Credit:
    """Credit over the number of paths through each step, for gradients that add a shared step once for every path."""
    spans = rollouts.spans["branch"]
    assert spans.parent is not None
    leaf = _leaf(spans).double()
    return credit.scaled(
        1 / rollouts.at_tokens(Signal(tree_sum(leaf, torch.ones_like(leaf), spans.parent), "branch")), rollouts
    )


def _leaf(spans: Spans) -> Tensor:
    assert spans.parent is not None
    return torch.ones(len(spans), dtype=torch.bool).index_fill_(0, spans.parent[spans.parent >= 0], False)


def _independent(world: Denoising, seeds: int) -> dict[str, Estimate]:
    """Rank and cosine on trees less those of GRPO on independent paths of as many steps, in pairs of batches of 64 groups."""
    alone, size = replace(world, forks=()), world.sampled(_TREE) // world.length
    found: dict[str, list[float]] = {"rank": [], "cosine": []}
    for seed in range(seeds):
        tree, paths = world.episodes(64, _TREE, seed=100 + seed), alone.episodes(64, size, seed=500 + seed)
        credit = branch_grpo(tree.rollouts)
        yardstick = Yardstick(tree, resamples=1)
        ours = {
            "rank": yardstick.measure(credit)["rank"],
            "cosine": yardstick.measure(counted_once(tree.rollouts, credit))["cosine"],
        }
        theirs = Yardstick(paths, resamples=1).measure(grpo()(paths.rollouts))
        for name, differences in found.items():
            differences.append(ours[name].value - theirs[name].value)
    return {name: mean_interval(differences) for name, differences in found.items()}


def _verdict(*numbers: Estimate) -> Verdict:
    if all(x.low > 0 for x in numbers):
        return "shown"
    return "contradicted" if all(x.high < 0 for x in numbers) else "not shown"


def _both(numbers: dict[str, Estimate], what: str) -> str:
    return " and ".join(f"{numbers[f'{what}, {name}'].value:+.3f}" for name in _WORLDS)
