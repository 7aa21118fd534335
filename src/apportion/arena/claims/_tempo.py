"""TEMPO: shared beginnings tell which early token decided, and nothing where no beginning is shared."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, decide, mean_of
from apportion.arena.worlds.trees import Trees, Where
from apportion.credit import grpo, tempo
from apportion.functional import segment_sum
from apportion.types import Credit

_SOURCE = "arXiv 2509.18314"
_SIZES = (4, 8, 16)
_ROUNDING = 1e-12


def tempo_is_grpo(quick: bool = False) -> Claim:
    """TEMPO less GRPO at the tokens after which as many responses share the beginning as before.

    Rule: shown if no two numbers differ by more than rounding, 1e-12; else contradicted. It follows from the equations.
    """
    gaps, off = [], []
    for where in ("early", "spread", "late"):
        episodes = _trees(where, 8, quick)
        r = episodes.rollouts
        tokens = r.tokens
        assert tokens is not None
        straight = r.action_mask & ~branches(tokens.view(-1, 8, r.width)).view_as(tokens)
        gap = (tempo()(r).advantages - grpo()(r).advantages).abs()
        gaps.append(float(gap[straight].max()))
        off.append(float(straight.sum() / r.action_mask.sum()))
    return Claim(
        method="tempo",
        source=_SOURCE,
        says="Off the branches of the tree of responses TEMPO is GRPO.",
        verdict="shown" if max(gaps) <= _ROUNDING else "contradicted",
        numbers={
            "largest difference off the branches": _exactly(max(gaps)),
            "share of tokens off the branches, least": _exactly(min(off)),
            "share of tokens off the branches, most": _exactly(max(off)),
        },
        because=f"The largest difference at any such token is {max(gaps):.1e}.",
    )


def tempo_credits_early_decisions(quick: bool = False) -> Claim:
    """Trees whose first three tokens decide, so that responses share them: TEMPO less GRPO, groups of 4, 8 and 16.

    Rule: shown if the decisive tokens get a larger share of all |credit|, and rank and gradient cosine are higher, in every
    size of group; contradicted if one is lower.
    """
    return _decisions(
        "early",
        quick,
        "Decisive early tokens get more of the credit than under GRPO, and what they get is righter.",
    )


def tempo_credits_late_decisions(quick: bool = False) -> Claim:
    """The same where the last three tokens decide, behind nine tokens of filler that make every response its own branch.

    Rule: as for early decisions.
    """
    return _decisions("late", quick, "Decisive tokens that come after freely worded text get more of the credit, too.")


def _decisions(where: Where, quick: bool, says: str) -> Claim:
    numbers: dict[str, Estimate] = {}
    for size in _SIZES:
        episodes = _trees(where, size, quick)
        ours, theirs = (method(episodes.rollouts) for method in (tempo(), grpo()))
        found = Yardstick(episodes).difference(ours, theirs)
        mass = mean_of(share_on_decisive(episodes, ours) - share_on_decisive(episodes, theirs))
        numbers |= {f"mass over GRPO, groups of {size}": mass}
        numbers |= {f"{name} over GRPO, groups of {size}": found[name] for name in ("rank", "cosine")}
    decided = decide(*numbers.values())
    changed = (ours.advantages - theirs.advantages).abs() > _ROUNDING
    numbers["share of decisive tokens that TEMPO changes, groups of 16"] = mean_of(
        _per_group(episodes, changed & episodes.decisive) / _per_group(episodes, episodes.decisive)
    )
    touched = numbers["share of decisive tokens that TEMPO changes, groups of 16"].value
    mass8, cosine8 = (numbers[f"{name} over GRPO, groups of 8"].value for name in ("mass", "cosine"))
    return Claim(
        method="tempo",
        source=_SOURCE,
        says=says,
        verdict=decided,
        numbers=numbers,
        because=f"In groups of 8 the decisive tokens' share of the credit changes by {mass8:+.3f} and the gradient's cosine "
        f"by {cosine8:+.3f}; in groups of 16 TEMPO differs from GRPO at {touched:.1%} of the decisive tokens.",
    )


def branches(tokens: Int[Tensor, "G N T"]) -> Bool[Tensor, "G N T"]:
    """Where fewer responses of the group begin with the tokens up to here than with those before; equal lengths.

    >>> branches(torch.tensor([[[1, 2, 3], [1, 5, 3]]]))[0].tolist()
    [[False, True, False], [False, True, False]]
    """
    same = (tokens[:, :, None] == tokens[:, None]).cumprod(-1).sum(2)
    before = torch.cat([torch.full_like(same[..., :1], tokens.shape[1]), same[..., :-1]], -1)
    return same < before


def share_on_decisive(episodes: Episodes, credit: Credit) -> Tensor:
    """Of the |credit| of each group, [G]; NaN where a group got none."""
    mass = credit.advantages.abs()
    return _per_group(episodes, torch.where(episodes.decisive, mass, 0.0)) / _per_group(episodes, mass)


def _per_group(episodes: Episodes, values: Tensor) -> Tensor:
    r = episodes.rollouts
    return segment_sum(values.double().sum(1), r.group_ids, r.num_groups)


def _trees(where: Where, size: int, quick: bool) -> Episodes:
    return Trees(where=where).episodes(groups=128 if quick else 1024, size=size, seed=2)


def _exactly(value: float) -> Estimate:
    return Estimate(value, value, value)
