"""Clip and Delta: a step that is repeated adds nothing to the return of the response."""

from typing import Literal

from apportion.arena._learning import mean_interval
from apportion.arena._measures import Estimate
from apportion.arena.claims._core import Claim, decide
from apportion.arena.claims._hacking import WORLD, accuracy, habits_after, padding
from apportion.credit import Estimator, bounded_return, chain, whiten
from apportion.types import Rollouts

_SOURCE = "arXiv 2410.15115"
_REPEATS = 6
_ROUNDING = 1e-12

Form = Literal["raw", "clip", "delta", "clip_delta"]


def clip_and_delta_bound_repeats(quick: bool = False) -> Claim:
    """Responses of one group that differ in how often a step of full score is repeated: the return of the first token.

    Rule: shown if every repetition adds the score to the raw return and no more than rounding, 1e-12, to the return under
    clip, delta and both; else contradicted. It follows from the equations.
    """
    raw, *bounded = (largest_gain(form) for form in ("raw", "clip", "delta", "clip_delta"))
    held = raw > 0 and all(gain <= _ROUNDING for gain in bounded)
    names = ("raw", "clip", "delta", "clip, then delta")
    return Claim(
        method="bounded_return",
        source=_SOURCE,
        says="Repeating a good step raises a summed process reward without limit, and does not raise it under Clip or Delta.",
        verdict="shown" if held else "contradicted",
        numbers={
            f"most that a repetition adds, {n}": Estimate(x, x, x) for n, x in zip(names, (raw, *bounded), strict=True)
        },
        because=f"A repetition of a step of score 1 adds {raw:.2f} to the raw return and at most {max(bounded):.0e} else.",
    )


def clip_stops_padding(quick: bool = False) -> Claim:
    """Training in the gamed world with the process reward as heavy as the outcome, raw and under Clip.

    Rule: shown if the share of steps that do nothing grows from where it began under the raw reward, and falls under this
    form, while accuracy is higher than under the raw reward; contradicted if one is the other way round. The paper's weight,
    0.02, is reported and decides nothing.
    """
    return _stops("clip", "Clip alone keeps a policy from padding.", quick)


def delta_stops_padding(quick: bool = False) -> Claim:
    """As `clip_stops_padding`, for Delta."""
    why = "; from a step on Delta adds up to the score of that step, but to 0 from the last: one more before it always pays"
    return _stops("delta", "Delta alone keeps a policy from padding.", quick, why)


def clip_delta_stops_padding(quick: bool = False) -> Claim:
    """As `clip_stops_padding`, for Clip and then Delta."""
    return _stops("clip_delta", "Clip and then Delta keep a policy from padding.", quick)


def largest_gain(form: Form) -> float:
    """The most that one more repetition adds to the return of a response, in a group with 0 to 6 of them.

    >>> largest_gain("raw")
    1.0
    """
    scores = [[1.0, 0.4, *[1.0] * n, 1.0] for n in range(_REPEATS + 1)]
    rollouts = Rollouts.from_lists(
        [[0] * len(row) for row in scores],
        groups=[0] * len(scores),
        outcome=[1.0] * len(scores),
        steps=[[(t, t + 1) for t in range(len(row))] for row in scores],
        process=scores,
    )
    first = bounded_return(form=form, alpha=1.0)(rollouts).advantages[:, 0]
    return float(first.diff().max())


def _stops(form: Form, says: str, quick: bool, why: str = "") -> Claim:
    seeds, tokens = (3, 100_000) if quick else (8, 150_000)
    raw, ours = (habits_after(_credit(f, 1.0), seeds, tokens) for f in ("raw", form))
    start = WORLD.habits(WORLD.table)
    numbers = {
        "idle steps gained, raw": mean_interval([padding(h) - padding(start) for h in raw]),
        "idle steps lost": mean_interval([padding(start) - padding(h) for h in ours]),
        "accuracy over raw": mean_interval([accuracy(h) - accuracy(r) for h, r in zip(ours, raw, strict=True)]),
    }
    verdict = decide(*numbers.values())
    for name, f in {} if quick else {"raw, at weight 0.02": "raw", "at weight 0.02": form}.items():
        light = habits_after(_credit(f, 0.02), seeds, tokens)
        numbers[f"idle steps, {name}"] = mean_interval([padding(h) for h in light])
        numbers[f"accuracy, {name}"] = mean_interval([accuracy(h) for h in light])
    idle, right = (sum(map(measure, ours)) / seeds for measure in (padding, accuracy))
    return Claim(
        method="bounded_return",
        source=_SOURCE,
        says=says,
        verdict=verdict,
        numbers=numbers,
        because=f"The share of idle steps goes from {padding(start):.2f} to {idle:.2f}, and to "
        f"{sum(map(padding, raw)) / seeds:.2f} under the raw reward; accuracy goes from {accuracy(start):.2f} to {right:.2f}{why}.",
    )


def _credit(form: Form, alpha: float) -> Estimator:
    return chain(bounded_return(form=form, alpha=alpha), whiten(over="group"))
