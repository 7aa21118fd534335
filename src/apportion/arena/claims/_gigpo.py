"""GiGPO: what was done in the same state is compared, so that waste shows inside a rollout."""

import torch
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, decide, mean_of
from apportion.arena.worlds.rooms import Rooms
from apportion.credit import gigpo, grpo
from apportion.types import Credit

_MEASURES = ("rank", "sign", "auc", "cosine")


def gigpo_finds_waste(quick: bool = False) -> Claim:
    """GiGPO with its defaults less GRPO in loops and rooms, groups of 8.

    A turn is good if its exact advantage is above 0, wasteful if below. `separation` is the chance that a good turn has more
    credit than a wasteful one, ties counting half. Rule: shown if separation is above 1/2 among turns of one rollout, and
    above GRPO's among turns of a group that began in the same state; contradicted if one is below. Among turns of one
    rollout GRPO's is 1/2, since they all get the same. The usual measures are reported and decide nothing.
    """
    episodes = Rooms().episodes(groups=64 if quick else 512, size=8, seed=3)
    r = episodes.rollouts
    ours, theirs = gigpo(r), grpo()(r)
    inside, same = (separation(episodes, ours, among) for among in ("rollout", "state"))
    decisive = {
        "separation over 1/2 inside a rollout": mean_of(inside - 0.5),
        "separation over GRPO in the same state": mean_of(same - separation(episodes, theirs, "state")),
    }
    yardstick = Yardstick(episodes)
    found = yardstick.difference(ours, theirs)
    others = {f"{name} over GRPO": found[name] for name in _MEASURES}
    others |= {
        "separation inside a rollout": mean_of(inside),
        "separation in the same state": mean_of(same),
        "separation inside a rollout, undiscounted": mean_of(separation(episodes, gigpo(r, gamma=1.0), "rollout")),
        "separation in the same state, GRPO": mean_of(separation(episodes, theirs, "state")),
        "success rate": _rate(episodes),
    }
    return Claim(
        method="gigpo",
        source="arXiv 2505.10978",
        says="In loops, good turns get more credit than wasteful ones, also inside one rollout, where GRPO gives all the "
        "same.",
        verdict=decide(*decisive.values()),
        numbers=decisive | others,
        because=f"A good turn has more credit than a wasteful one of its rollout with chance "
        f"{others['separation inside a rollout'].value:.2f}, and than one from the same state with chance "
        f"{others['separation in the same state'].value:.2f}, where GRPO's is "
        f"{others['separation in the same state, GRPO'].value:.2f}.",
    )


def separation(episodes: Episodes, credit: Credit, among: str) -> Tensor:
    """The chance that a good turn has more credit than a wasteful one, in each group, [G]; NaN where there is no pair.

    Pairs are turns of one rollout, or of one group and "state".
    """
    r, turns = episodes.rollouts, episodes.rollouts.spans["turn"]
    assert turns.state is not None
    at = (turns.row, turns.stop - 1)  # the action is the turn's last token
    exact, given = episodes.advantages[at], credit.advantages[at].double()
    given = (given * 1e9).round()  # rounding is no difference
    key = turns.row if among == "rollout" else turns.state
    group, found = r.group_ids[turns.row], []
    for g in range(r.num_groups):
        mine = group == g
        a, c, k = exact[mine], given[mine], key[mine]
        pair = (a[:, None] > 0) & (a < 0) & (k[:, None] == k)
        won = ((c[:, None] - c).sign() + 1) / 2
        found.append(won[pair].mean())
    return torch.stack(found)


def _rate(episodes: Episodes) -> Estimate:
    r = episodes.rollouts
    return mean_of(r.signals["outcome"].values.view(r.num_groups, -1).mean(1))
