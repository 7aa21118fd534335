"""NSR: learning from wrong answers alone keeps pass@k, which learning from right answers alone loses."""

from apportion.arena._learning import mean_interval
from apportion.arena._measures import Estimate
from apportion.arena.claims._core import Claim, decide
from apportion.arena.claims._coverage import TRIES, WORLDS, course, level_of_both, when
from apportion.credit import nsr, psr

_SOURCE = "arXiv 2506.01347"
_PASS = f"held-out pass@{TRIES}"
_LOST, _KEPT = "lost by PSR", "of NSR over PSR at equal accuracy"
_AT_END, _CHANGE = "of NSR over PSR at equal tokens", "of NSR over the start"


def nsr_loses_less_than_psr(quick: bool = False) -> Claim:
    """One policy for many problems, trained with PSR and with NSR, 40 seeds; pass@64 on held-out problems, exact.

    Who learns less loses less, so the two are compared at equal accuracy on the training problems, the largest that both
    reached. Rule: shown if there PSR has less pass@64 than at the start, and NSR more than PSR, on hard and on easy
    problems; contradicted if one of these is the other way round. The difference at equal tokens decides nothing.
    """
    found = {name: _compared(name, *_size(quick)) for name in WORLDS}
    lost, kept, at_end = (
        {f"pass@{TRIES} {what}, {name}": numbers[what] for name, numbers in found.items()}
        for what in (_LOST, _KEPT, _AT_END)
    )
    return Claim(
        method="nsr",
        source=_SOURCE,
        says=f"At equal accuracy, learning from wrong answers alone costs less pass@{TRIES} than learning from right ones "
        "alone.",
        verdict=decide(*lost.values(), *kept.values()),
        numbers=lost | kept | at_end,
        because=f"PSR lost {_values(lost, '.3f')} on hard and easy problems; NSR stood {_values(kept, '+.3f')} above it at "
        f"equal accuracy and {_values(at_end, '+.3f')} at equal tokens.",
    )


def nsr_keeps_pass_at_k(quick: bool = False) -> Claim:
    """The same training: pass@64 of NSR less that at the start, where it has come as far as PSR.

    Rule: shown if NSR has not less than at the start, on hard and on easy problems; contradicted if it has less on one.
    """
    kept = {f"change of pass@{TRIES} under NSR, {name}": _compared(name, *_size(quick))[_CHANGE] for name in WORLDS}
    return Claim(
        method="nsr",
        source=_SOURCE,
        says=f"Learning from wrong answers alone keeps pass@{TRIES}.",
        verdict=decide(*kept.values()),
        numbers=kept,
        because=f"When NSR was as accurate as PSR became, its pass@{TRIES} had changed by {_values(kept, '+.3f')} on hard and "
        "easy problems.",
    )


def _size(quick: bool) -> tuple[int, int]:
    """Seeds and steps."""
    return (4, 40) if quick else (40, 100)


def _compared(name: str, seeds: int, steps: int) -> dict[str, Estimate]:
    found: dict[str, list[float]] = {_LOST: [], _KEPT: [], _AT_END: [], _CHANGE: []}
    for seed in range(seeds):
        positive, negative = (course(WORLDS[name], method, seed, steps) for method in (psr(), nsr()))
        level = level_of_both(positive, negative)
        start, of_psr, of_nsr = positive[0][_PASS], when(positive, level, _PASS), when(negative, level, _PASS)
        found[_LOST].append(start - of_psr)
        found[_KEPT].append(of_nsr - of_psr)
        found[_AT_END].append(negative[-1][_PASS] - positive[-1][_PASS])
        found[_CHANGE].append(of_nsr - start)
    return {what: mean_interval(values) for what, values in found.items()}


def _values(numbers: dict[str, Estimate], form: str) -> str:
    return " and ".join(format(x.value, form) for x in numbers.values())
