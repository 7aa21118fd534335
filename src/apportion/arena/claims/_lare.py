"""LaRe: rewards decoded from factors of the steps find the factors that matter, if these do not come together."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._learned import ROOM_FACTORS, Lesson, Reader, Tabular, choices, decoded, factor_weights, factors
from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, decide, mean_of
from apportion.arena.worlds.rooms import Rooms
from apportion.arena.worlds.trees import Trees
from apportion.credit import grpo, redistribution
from apportion.functional import segment_sum

_SOURCE = "arXiv 2412.11120"
_MEASURES = ("auc", "blame", "rank", "cosine")


def lare_finds_what_matters(quick: bool = False) -> Claim:
    """Token trees; factors say which token stands at which place, and three places of twelve decide.

    Rule: shown if the share of the weights that lies on decisive places is above the share of such places, and AUC, blame,
    rank and gradient cosine of the decoded step rewards less their even share (`redistribution`) are above those of GRPO,
    after 1,024 groups of 8 rollouts (quick: 256); contradicted if one is lower. Intervals are over lessons.
    """
    world, usual = Trees(), 256 if quick else 1024
    numbers: dict[str, list[float]] = {}
    shares: dict[int, list[float]] = {}
    for seed in _seeds(quick):
        for groups in (64, usual):
            shares.setdefault(groups, []).append(_share(world, factor_weights(world, _lesson(seed, groups))))
        episodes = _scored(world, seed, _lesson(seed, usual))
        found = Yardstick(episodes, resamples=1).difference(
            redistribution()(episodes.rollouts), grpo()(episodes.rollouts)
        )
        for name in _MEASURES:
            numbers.setdefault(f"{name} over GRPO", []).append(found[name].value)
    chance = world.decisions / world.length
    decisive = {"share of weight on decisive places, over chance": mean_of([x - chance for x in shares[usual]])}
    decisive |= {name: mean_of(values) for name, values in numbers.items()}
    others = {f"share of weight on decisive places, {n} groups": mean_of(x) for n, x in shares.items()}
    share, auc = others[f"share of weight on decisive places, {usual} groups"].value, decisive["auc over GRPO"].value
    return Claim(
        method="lare",
        source=_SOURCE,
        says="Decoded from factors of the steps, the return goes to the factors that matter.",
        verdict=decide(*decisive.values()),
        numbers=decisive | others,
        because=f"{share:.0%} of the squared weights lie on the {chance:.0%} of places that decide, and the first wrong step "
        f"has less credit than another token with a chance of {0.5 + auc:.2f}.",
    )


def lare_between_companions(quick: bool = False) -> Claim:
    """Loops and rooms, where nobody opens the door without the key: how does the decoder share between the two?

    What factors are truly worth is the least-squares fit of the exact advantages of the steps.
    Rule: shown if decoded step rewards correlate with that fit, and the key's share of what key and door get is less than
    0.25 from its true share; contradicted if they correlate negatively, or the share is farther off. Reported besides:
    measures of `redistribution` less those of GRPO.
    """
    world, usual = Rooms(), 256 if quick else 1024
    numbers: dict[str, list[float]] = {}
    for seed in _seeds(quick):
        lesson = _lesson(seed, usual)
        episodes = _scored(world, seed, lesson)
        r, phi = episodes.rollouts, factors(world, episodes).double()
        steps = r.spans["step"]
        exact = episodes.advantages[steps.row, steps.stop - 1]
        worth = torch.linalg.lstsq(phi, exact[:, None], driver="gelsd").solution[:, 0]
        weights = factor_weights(world, lesson).mean(0)
        both = torch.stack([r.signals["decoded"].values, phi @ worth])
        found = Yardstick(episodes, resamples=1).difference(redistribution()(r), grpo()(r))
        now = {
            "correlation with the true worth": float(torch.corrcoef(both)[0, 1]),
            "key's share, 0.25 less the error": 0.25 - abs(_of_key(weights) - _of_key(worth)),
            "key's share, decoded": _of_key(weights),
            "key's share, true": _of_key(worth),
            **{f"{name} over GRPO": found[name].value for name in _MEASURES},
        }
        for name, value in now.items():
            numbers.setdefault(name, []).append(value)
    measured = {name: mean_of(values) for name, values in numbers.items()}
    true, got = (measured[f"key's share, {x}"].value for x in ("true", "decoded"))
    return Claim(
        method="lare",
        source=_SOURCE,
        says="Decoded from factors that come together, as the key that opens the door, the return still goes to what matters.",
        verdict=decide(measured["correlation with the true worth"], measured["key's share, 0.25 less the error"]),
        numbers=measured,
        because=f"Of what key and door are worth together {true:.0%} is the key's; it gets {got:.0%}, as lacking it explains "
        "most failures, and the outcome does not say how to share.",
    )


def lare_learns_from_less(quick: bool = False) -> Claim:
    """Trees whose one decision makes the outcome a sum over factors: few factors against raw inputs, with few rollouts.

    Readers: "matter", tokens at the decisive place; "places", at any place; "raw", the policy's own situation and choice.
    Rule: shown if, after 16, 32 and 64 rollouts a prompt, "matter" has more rank, more gradient cosine and a better fit to
    new outcomes than "raw"; contradicted if one is lower. Reported besides: "places" over "raw", and all of it with three
    decisions, where the outcome is not a sum over factors.
    """
    readers: Mapping[str, Reader] = {"matter": tokens_that_matter, "places": factors, "raw": raw_inputs}
    numbers: dict[str, Estimate] = {}
    for decisions in (1, 3):
        world = Trees(prompts=4, decisions=decisions)
        for rollouts in (16, 32, 64):
            found = {
                name: [_quality(world, seed, _lesson(seed, 4 * rollouts // 8), read) for seed in _seeds(quick)]
                for name, read in readers.items()
            }
            for name in ("matter", "places"):
                for measure in ("rank", "cosine", "fit"):
                    gains = [a[measure] - b[measure] for a, b in zip(found[name], found["raw"], strict=True)]
                    where = f"{name} over raw, {rollouts} rollouts, {decisions} decision{'s' * (decisions > 1)}"
                    numbers[f"{measure} of {where}"] = mean_of(gains)
    decisive = {name: x for name, x in numbers.items() if "matter" in name and name.endswith("1 decision")}
    one, three = (numbers[f"rank of matter over raw, 32 rollouts, {x}"].value for x in ("1 decision", "3 decisions"))
    return Claim(
        method="lare",
        source=_SOURCE,
        says="If the return is linear in few factors, fewer rollouts teach what a step is worth than with raw inputs.",
        verdict=decide(*decisive.values()),
        numbers=decisive | numbers,
        because=f"With 32 rollouts a prompt the factors that matter change the rank correlation by {one:+.2f}; where three "
        f"decisions act together and no sum of these factors is right, by {three:+.2f}.",
    )


def tokens_that_matter(world: Tabular, episodes: Episodes) -> Float[Tensor, "S D"]:
    """As `factors` of trees, of decisive places alone; and a factor that every step has."""
    assert isinstance(world, Trees)
    phi = factors(world, episodes)
    at_places = phi.view(len(phi), world.length, -1)[:, world.places].flatten(1)
    return torch.cat([torch.ones_like(phi[:, :1]), at_places], 1)


def raw_inputs(world: Tabular, episodes: Episodes) -> Float[Tensor, "S D"]:
    """Every choice in every situation of the policy: factor `state * actions + action`."""
    r, (_, states, actions) = episodes.rollouts, world.table.logits.shape
    _, state, action = choices(world.table, episodes)
    phi = torch.zeros(len(r.spans["step"]), states * actions)
    phi[r.span_ids("step")[r.action_mask], (state * actions + action)[r.action_mask]] = 1.0
    return phi


def _seeds(quick: bool) -> range:
    return range(4 if quick else 8)


def _lesson(seed: int, groups: int) -> Lesson:
    """Another one for each seed."""
    return Lesson(groups, seed=1_000_000 + 1_000 * seed)


def _scored(world: Tabular, seed: int, lesson: Lesson, read: Reader = factors) -> Episodes:
    episodes = world.episodes(groups=128, size=8, seed=seed)
    signal = decoded(world, episodes, lesson, read)
    return replace(episodes, rollouts=episodes.rollouts.with_signals(decoded=signal))


def _share(world: Trees, weights: Float[Tensor, "K D"]) -> float:
    """Of the squares of the weights, each less the mean of its place, what lies on decisive places."""
    by_place = weights.view(len(weights), world.length, world.choices).var(-1).sum(0)
    return float(by_place[world.places].sum() / by_place.sum())


def _of_key(worth: Float[Tensor, " D"]) -> float:
    key, door = (float(worth[ROOM_FACTORS.index(x)]) for x in ("key taken", "door opened"))
    return key / (key + door)


def _quality(world: Tabular, seed: int, lesson: Lesson, read: Reader) -> Mapping[str, float]:
    """Rank and cosine of `redistribution`; the share of the variance of new outcomes that the sums of rewards explain."""
    episodes = _scored(world, seed, lesson, read)
    r = episodes.rollouts
    found = Yardstick(episodes, resamples=1).measure(redistribution()(r))
    sums = segment_sum(r.signals["decoded"].values, r.spans["step"].row, r.batch)
    outcome = r.signals["outcome"].values
    fit = 1 - float((sums - outcome).square().mean() / outcome.var(correction=0))
    return {"rank": found["rank"].value, "cosine": found["cosine"].value, "fit": fit}
