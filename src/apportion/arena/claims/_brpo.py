"""BRPO: own earlier answers make a better baseline than the group alone, the more so the longer the thinking."""

import torch
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, decide, mean_of
from apportion.arena.worlds.budgets import Budgets
from apportion.credit import assemble, brpo, dr_grpo
from apportion.types import Credit, Signal

_SOURCE = "arXiv 2505.13438"
_SIZE = 8
_LONGER = {2: Budgets(budgets=2, length=12), 4: Budgets(budgets=4, length=24), 8: Budgets(budgets=8, length=48)}


def brpo_lowers_variance(quick: bool = False) -> Claim:
    """Thinking cut at four budgets, as in the paper: the variance of the policy gradient of a group of 8.

    All gradients are scaled to the same average along the exact one. Compared are GRPO (mean-centred, one number for the
    whole response) and GRPO's baseline on BRPO's own returns (what is still to come, less the group's mean of it).

    Rule: shown if BRPO's variance is lower than both; contradicted if it is higher than one. Other numbers of answers at a
    cut, other priors and the direction of the average gradient are reported and decide nothing.
    """
    episodes = _thought(Budgets(), quick)
    ours, theirs = brpo()(episodes.rollouts), above_group(episodes, Budgets())
    numbers = {
        "variance saved, to GRPO": mean_of(saved(episodes, ours, dr_grpo()(episodes.rollouts))),
        "variance saved, to GRPO's baseline": mean_of(saved(episodes, ours, theirs)),
    }
    verdict = decide(*numbers.values())
    numbers |= {
        "aim over GRPO's baseline": Yardstick(episodes).difference(ours, theirs)["aim"],
        "variance saved, to GRPO's baseline, 1 answer per cut": _saved(Budgets(summaries=1), quick),
        "variance saved, to GRPO's baseline, 16 answers per cut": _saved(Budgets(summaries=16), quick),
        "variance saved, to GRPO's baseline, all weight on the last budget": _saved(Budgets(prior="base"), quick),
    }
    all_, baseline = (numbers[f"variance saved, to {what}"].value for what in ("GRPO", "GRPO's baseline"))
    return Claim(
        method="brpo",
        source=_SOURCE,
        says="Under budgets BRPO's policy gradient has less variance than GRPO's, thanks to its baseline.",
        verdict=verdict,
        numbers=numbers,
        because=f"At the same average gradient it has {all_:.0%} less variance than GRPO, but only {baseline:.1%} less than "
        "GRPO's baseline on the same returns: most is won by counting only the answers still to come.",
    )


def brpo_helps_long_thinking(quick: bool = False) -> Claim:
    """As `brpo_lowers_variance`, with 2, 4 and 8 budgets of 6 tokens each, against GRPO's baseline on the same returns.

    Rule: shown if the share of variance saved grows from 2 to 4 and from 4 to 8; contradicted if it falls once.
    """
    shares = {}
    for budgets, world in _LONGER.items():
        episodes = _thought(world, quick)
        shares[budgets] = saved(episodes, brpo()(episodes.rollouts), above_group(episodes, world))
    growth = {f"saved with {b} budgets over {a}": mean_of(shares[b] - shares[a]) for a, b in ((2, 4), (4, 8))}
    found = {f"variance saved, {budgets} budgets": mean_of(share) for budgets, share in shares.items()}
    listed = ", ".join(f"{share.mean():+.1%}" for share in shares.values())
    return Claim(
        method="brpo",
        source=_SOURCE,
        says="The longer the thinking, the more variance BRPO's baseline saves.",
        verdict=decide(*growth.values()),
        numbers=growth | found,
        because=f"Of the variance under GRPO's baseline it saves {listed} with 2, 4 and 8 budgets.",
    )


def above_group(episodes: Episodes, world: Budgets) -> Credit:
    """GRPO's baseline on BRPO's returns: on each stretch the weighed scores still to come, less the group's mean of them."""
    r = episodes.rollouts
    score = r.signals["score"].values.view(r.num_groups, -1, world.budgets, 1 + world.summaries)[..., 1:].mean(-1)
    to_come = (world.weights * score).flip(-1).cumsum(-1).flip(-1)
    above = (to_come - to_come.mean(1, keepdim=True)).view(r.batch, world.budgets)
    return assemble(r, r.action_mask, {"group": Signal(above.repeat_interleave(r.width // world.budgets, 1), "token")})


def saved(episodes: Episodes, ours: Credit, theirs: Credit) -> Tensor:
    """The share of the variance under `theirs` that `ours` saves: its mean over the groups is that share, [G]."""
    first, second = _spread(episodes, ours), _spread(episodes, theirs)
    return (second - first) / second.mean()


def _saved(world: Budgets, quick: bool) -> Estimate:
    episodes = _thought(world, quick)
    return mean_of(saved(episodes, brpo(prior=world.prior)(episodes.rollouts), above_group(episodes, world)))


def _spread(episodes: Episodes, credit: Credit) -> Tensor:
    """Squared distance of each group's gradient from its prompt's average, once that is scaled to the exact one, [G]."""
    got, exact = episodes.gradients(credit.advantages), episodes.gradient
    got = got * exact.square().sum() / (got * exact).sum()
    prompts = int(episodes.prompts.max()) + 1
    average = torch.zeros(prompts, got.shape[1], dtype=got.dtype).index_add_(0, episodes.prompts, got)
    average = average / episodes.prompts.bincount()[:, None]
    return (got - average[episodes.prompts]).square().sum(1)


def _thought(world: Budgets, quick: bool) -> Episodes:
    return world.episodes(groups=256 if quick else 2048, size=_SIZE, seed=3)
