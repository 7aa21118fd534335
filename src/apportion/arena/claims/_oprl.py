"""OPRL: step rewards learned from outcomes alone order actions as the exact advantage does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._learned import Lesson, Tabular, choices, log_ratio
from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, decide, mean_of
from apportion.arena.worlds.rooms import Rooms
from apportion.arena.worlds.trees import Trees
from apportion.credit import grpo, implicit_reward, oprl, rloo
from apportion.functional import segment_count, segment_sum
from apportion.types import Credit, Signal

_SOURCE = "arXiv 2509.19199"
_WORLDS: Mapping[str, Trees | Rooms] = {"trees": Trees(), "rooms": Rooms()}
_AMOUNTS = (64, 256, 1024, 4096)
_USUAL = 1024


def oprl_orders_actions(quick: bool = False) -> Claim:
    """Log-ratio of each token, of a model that saw other rollouts, with 8 lessons; token trees, and loops and rooms.

    Rule: shown if, in both worlds, after 1,024 groups (quick: 256), rank is higher than that of RLOO and than that of the
    same model taught by outcomes that are coins, and AUC is above the 0.5 of chance; contradicted if one is lower. Reported
    besides: other amounts, a fifth of the outcomes wrong, and plain counting of the same rollouts. Intervals are over lessons.
    """
    usual = 256 if quick else _USUAL
    decisive: dict[str, Estimate] = {}
    others: dict[str, Estimate] = {}
    for name, world in _WORLDS.items():
        taught = {amount: _taught(world, quick, Lesson(amount)) for amount in ((64, usual) if quick else _AMOUNTS)}
        outcome = _taught(world, quick, None)
        coins = _taught(replace(world, verifier_error=0.5), quick, Lesson(usual))
        noisy = _taught(replace(world, verifier_error=0.2), quick, Lesson(usual))
        counted = _taught(world, quick, Lesson(usual), count=True)
        decisive |= {
            f"rank over RLOO, {name}": _gain(taught[usual], outcome, "rank"),
            f"rank over outcomes that are coins, {name}": _gain(taught[usual], coins, "rank"),
            f"auc over chance, {name}": mean_of([x["auc"] - 0.5 for x in taught[usual]]),
        }
        others |= {f"rank after {n} groups, {name}": mean_of([x["rank"] for x in taught[n]]) for n in taught}
        others |= {f"bias after {n} groups, {name}": mean_of([x["bias"] for x in taught[n]]) for n in taught}
        others |= {
            f"sign after {usual} groups, {name}": mean_of([x["sign"] for x in taught[usual]]),
            f"rank of RLOO, {name}": mean_of([x["rank"] for x in outcome]),
            f"rank, 20% of outcomes wrong, {name}": mean_of([x["rank"] for x in noisy]),
            f"rank over counting the same rollouts, {name}": _gain(taught[usual], counted, "rank"),
            f"bias over counting the same rollouts, {name}": _gain(taught[usual], counted, "bias"),
        }
    trees, rooms = (
        f"{others[f'rank after {usual} groups, {x}'].value:.2f} ({others[f'rank of RLOO, {x}'].value:.2f} for RLOO)"
        for x in _WORLDS
    )
    beyond = " and ".join(f"{-others[f'rank over counting the same rollouts, {x}'].value:+.2f}" for x in _WORLDS)
    return Claim(
        method="oprl",
        source=_SOURCE,
        says="Step rewards that a model learns from the outcomes of trajectories order actions as the exact advantage does.",
        verdict=decide(*decisive.values()),
        numbers=decisive | others,
        because=f"After {usual:,} groups of 8 rollouts the rank correlation is {trees} in trees and {rooms} in rooms; counting "
        f"outcomes of the same rollouts in a table would change it by {beyond}.",
    )


def oprl_over_grpo(quick: bool = False) -> Claim:
    """OPRL's whole credit less GRPO's in trees and rooms, the model having seen 1,024 groups (quick: 256) of rollouts.

    Rule: shown if rank, sign and gradient cosine are higher in both worlds; contradicted if one is lower. The aim, where
    more samples lead, is reported and decides nothing.
    """
    usual = 256 if quick else _USUAL
    decisive: dict[str, Estimate] = {}
    aims: dict[str, Estimate] = {}
    for name, world in _WORLDS.items():
        ours, theirs = [], []
        for seed in _seeds(quick):
            episodes = _scored(world, seed, Lesson(usual))
            yardstick = Yardstick(episodes, resamples=1)
            ours.append(_values(yardstick, oprl(spans="step")(episodes.rollouts)))
            theirs.append(_values(yardstick, grpo()(episodes.rollouts)))
        decisive |= {f"{x} over GRPO, {name}": _gain(ours, theirs, x) for x in ("rank", "sign", "cosine")}
        aims |= {f"aim over GRPO, {name}": _gain(ours, theirs, "aim")}
    cosine, aim = (
        " and ".join(f"{x.value:+.2f}" for k, x in (decisive | aims).items() if m in k) for m in ("cosine", "aim")
    )
    return Claim(
        method="oprl",
        source=_SOURCE,
        says="Added to the outcome, the learned step rewards give better credit than the outcome alone.",
        verdict=decide(*decisive.values()),
        numbers=decisive | aims,
        because=f"The cosine of a group's gradient with the exact one changes by {cosine} in trees and rooms; that of "
        f"the average over many groups by {aim}, since the learned part is biased.",
    )


def _seeds(quick: bool) -> range:
    return range(4 if quick else 8)


def _scored(world: Tabular, seed: int, lesson: Lesson | None, count: bool = False) -> Episodes:
    """Episodes with the log-ratio of a model that learned from a lesson of its own; all seeds differ."""
    episodes = world.episodes(groups=128, size=8, seed=seed)
    if lesson is None:
        return episodes
    lesson = replace(lesson, seed=lesson.seed + 1_000 * seed)
    signal = _counted(world, episodes, lesson) if count else log_ratio(world, episodes, lesson)
    return replace(episodes, rollouts=episodes.rollouts.with_signals(log_ratio=signal))


def _taught(world: Tabular, quick: bool, lesson: Lesson | None, count: bool = False) -> list[Mapping[str, float]]:
    """Measures of the log-ratio itself (no lesson: of RLOO), for each seed."""
    method = rloo() if lesson is None else implicit_reward()
    found = []
    for seed in _seeds(quick):
        episodes = _scored(world, seed, lesson, count)
        found.append(_values(Yardstick(episodes, resamples=1), method(episodes.rollouts)))
    return found


def _values(yardstick: Yardstick, credit: Credit) -> Mapping[str, float]:
    return {name: x.value for name, x in yardstick.measure(credit).items()}


def _gain(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], measure: str) -> Estimate:
    return mean_of([a[measure] - b[measure] for a, b in zip(ours, theirs, strict=True)])


def _counted(world: Tabular, episodes: Episodes, lesson: Lesson) -> Signal:
    """The mean outcome after a choice less that after the situation, in the rollouts of the lesson; 0 where none was there."""
    shape = world.table.logits.shape
    total, visits = torch.zeros(2, shape.numel(), dtype=torch.float64)
    for seen in lesson.episodes(world):
        r, at = seen.rollouts, seen.rollouts.action_mask
        which = _number(shape, *(x[at] for x in choices(world.table, seen)))
        total += segment_sum(r.at_tokens(r.signals["outcome"])[at], which, shape.numel())
        visits += segment_count(which, shape.numel())
    total, visits = total.view(shape), visits.view(shape)
    before = total.sum(-1, keepdim=True) / visits.sum(-1, keepdim=True)
    gain = torch.where(visits > 0, total / visits - before, 0.0)
    found = gain[choices(world.table, episodes)]
    return Signal(torch.where(episodes.rollouts.action_mask, found, 0.0), "token")


def _number(shape: torch.Size, prompt: Tensor, state: Tensor, action: Tensor) -> Tensor:
    return (prompt * shape[1] + state) * shape[2] + action
