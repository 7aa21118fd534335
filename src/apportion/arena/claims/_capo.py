"""CAPO: a judge that names wrong steps tells where the credit belongs, also when it errs and several critiques vote."""

from apportion.arena._measures import Estimate, Yardstick
from apportion.arena.claims._core import Claim, decide
from apportion.arena.worlds.trees import Trees
from apportion.credit import capo, grpo
from apportion.credit._process import Vote
from apportion.types import Rollouts, Signal

_SOURCE = "arXiv 2508.02298"
_MEASURES = ("auc", "blame", "rank", "cosine")
_ERRORS = (0.1, 0.2, 0.3, 0.4)
_OTHER_VOTES: tuple[Vote, ...] = ("intersection", "average", "union")
_REPORTED = 0.2


def capo_localises(quick: bool = False) -> Claim:
    """CAPO's defaults less GRPO on token trees, with 0 to 40 % of the verdicts flipped.

    Rule: shown if AUC, blame, rank and gradient cosine are higher at every flip rate; contradicted if one is lower.
    """
    numbers: dict[str, Estimate] = {}
    for error in (0.0, *_ERRORS):
        yardstick = _judged(error, quick)
        r = yardstick.episodes.rollouts
        numbers |= _named(f"over GRPO, {error:.0%} flipped", yardstick.difference(capo()(r), grpo()(r)))
    # GRPO's own AUC is exactly 0.5
    clean, noisy = (numbers[f"auc over GRPO, {error:.0%} flipped"].value + 0.5 for error in (0.0, 0.4))
    return Claim(
        method="capo",
        source=_SOURCE,
        says="Tokens of a wrong step get less credit than the others of their response, where GRPO gives all the same.",
        verdict=decide(*numbers.values()),
        numbers=numbers,
        because=f"The chance that the first wrong step has less credit than another token is {clean:.2f} with a perfect "
        f"judge and {noisy:.2f} with 40 % of its verdicts flipped; it is exactly 0.50 for GRPO.",
    )


def capo_votes(quick: bool = False) -> Claim:
    """Majority of three critiques less a single critique on token trees, with 10 to 40 % of the verdicts flipped.

    Rule: shown if AUC, blame, rank and gradient cosine are higher at every flip rate; contradicted if one is lower. The
    other votes are reported at 20 % and decide nothing.
    """
    decisive: dict[str, Estimate] = {}
    others: dict[str, Estimate] = {}
    for error in _ERRORS:
        yardstick = _judged(error, quick)
        r = yardstick.episodes.rollouts
        single = capo()(_first_critique(r))
        found = yardstick.difference(capo(vote="majority")(r), single)
        decisive |= _named(f"majority of 3 over 1, {error:.0%} flipped", found)
        for vote in _OTHER_VOTES if error == _REPORTED else ():
            found = yardstick.difference(capo(vote=vote)(r), single)
            others |= _named(f"{vote} of 3 over 1, {error:.0%} flipped", found)
    auc, cosine = (decisive[f"{name} majority of 3 over 1, 20% flipped"].value for name in ("auc", "cosine"))
    strict, any_ = (others[f"auc {vote} of 3 over 1, 20% flipped"].value for vote in ("intersection", "union"))
    return Claim(
        method="capo",
        source=_SOURCE,
        says="Several critiques that vote make up for the errors of each.",
        verdict=decide(*decisive.values()),
        numbers=decisive | others,
        because=f"With 20 % of the verdicts flipped a majority of three changes AUC by {auc:+.3f} and gradient cosine by "
        f"{cosine:+.3f}; AUC changes by {strict:+.3f} under the intersection and by {any_:+.3f} under the union.",
    )


def _judged(error: float, quick: bool) -> Yardstick:
    return Yardstick(Trees(verdict_error=error).episodes(groups=128 if quick else 1024, size=8, seed=1))


def _first_critique(rollouts: Rollouts) -> Rollouts:
    judge = rollouts.signals["judge"]
    return rollouts.with_signals(judge=Signal(judge.values[:, :1], judge.unit, judge.axes))


def _named(what: str, found: dict[str, Estimate]) -> dict[str, Estimate]:
    return {f"{measure} {what}": found[measure] for measure in _MEASURES}
