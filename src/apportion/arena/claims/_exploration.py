"""HICRA, UCAS and attention rhythm: credit that changes how a policy explores."""

from collections.abc import Callable, Mapping, Sequence

from apportion.arena._learning import Curve, area, learn, mean_interval
from apportion.arena._measures import Estimate
from apportion.arena.claims._core import Claim, decide
from apportion.arena.claims._coverage import TRIES, WORLDS, Course, course, level_of_both, when
from apportion.arena.worlds.arithmetic import Arithmetic
from apportion.credit import (
    Estimator,
    amplify_by_attention,
    attention_rhythm,
    chain,
    dr_grpo,
    grpo,
    hicra,
    ucas,
)

_PASS = f"held-out pass@{TRIES}"


def hicra_keeps_plans_open(quick: bool = False) -> Claim:
    """One policy for many problems, decisive tokens marked as planning; HICRA less its base, GRPO without deviation.

    Rule, at equal tokens: shown if the entropy of planning tokens and pass@64 on held-out problems are higher, on hard and
    on easy problems, over 20 seeds; contradicted if one is lower. Accuracy, the differences at equal accuracy, and those
    from GRPO with deviation decide nothing.
    """
    decisive, others = _explored(hicra(), dr_grpo(), "planning entropy", *_size(quick))
    beside = {
        f"{name}, with deviation": x
        for name, x in _explored(hicra(), grpo(), "planning entropy", *_size(quick))[0].items()
    }
    return Claim(
        method="hicra",
        source="arXiv 2509.03646",
        says="More credit for planning tokens keeps plans diverse: more entropy there and more pass@k than GRPO.",
        verdict=decide(*decisive.values()),
        numbers=decisive | others | beside,
        because=f"{_told(decisive, others)}; over GRPO with deviation entropy {_values(beside, 'entropy')} and pass@{TRIES} "
        f"{_values(beside, _PASS)}.",
    )


def ucas_keeps_exploring(quick: bool = False) -> Claim:
    """One policy for many problems, trained with UCAS and its defaults, and with GRPO.

    Rule, at equal tokens: shown if the entropy of all tokens and pass@64 on held-out problems are higher, on hard and on
    easy problems, over 20 seeds; contradicted if one is lower. Accuracy and the differences at equal accuracy decide
    nothing.
    """
    decisive, others = _explored(ucas(), grpo(), "entropy", *_size(quick))
    return Claim(
        method="ucas",
        source="arXiv 2510.10649",
        says="Credit shaped by the model's confidence keeps exploration up: more entropy and more pass@k than GRPO.",
        verdict=decide(*decisive.values()),
        numbers=decisive | others,
        because=f"{_told(decisive, others)}.",
    )


def attention_rhythm_learns_faster(quick: bool = False) -> Claim:
    """Written arithmetic, a transformer whose attention is measured: attention rhythm and GRPO from the same start, 5 seeds.

    Responses have some 20 tokens, so the bound on their length is lifted; otherwise these are the defaults. Random numbers in
    the place of attention tell whether it matters which tokens get more. Rule, at equal tokens: shown if the mean accuracy
    on the way is higher than GRPO's and than with random numbers, contradicted if it is lower than GRPO's, else not shown.
    Entropy and pass@8 at the end decide nothing.
    """
    seeds, tokens = (2, 5_500) if quick else (5, 48_000)
    curves = {name: [_sums(method, seed, tokens) for seed in range(seeds)] for name, method in _RHYTHMS.items()}

    def over(name: str, other: str, what: str) -> Estimate:
        of = _READINGS[what]
        return mean_interval([of(a) - of(b) for a, b in zip(curves[name], curves[other], strict=True)])

    ours, placebo, plain = "attention rhythm", "random numbers", "GRPO"
    decisive = {f"mean accuracy over {other}": over(ours, other, "mean accuracy") for other in (plain, placebo)}
    verdict = decide(next(iter(decisive.values())))
    if verdict == "shown":
        verdict = "shown" if decide(*decisive.values()) == "shown" else "not shown"
    others = {f"{what} over {plain}": over(ours, plain, what) for what in ("entropy", "pass@8")}
    others |= {f"{what} of {placebo} over {plain}": over(placebo, plain, what) for what in _READINGS}
    accuracy, beyond, entropy, tries = (x.value for x in [*decisive.values(), *list(others.values())[:2]])
    return Claim(
        method="attention_rhythm",
        source="arXiv 2510.13554",
        says="More credit where attention plans and where it comes back to makes a policy better with the same tokens; more "
        "credit for random tokens does not.",
        verdict=verdict,
        numbers=decisive | others,
        because=f"The mean accuracy on the way is {accuracy:+.4f} over GRPO and {beyond:+.4f} over random numbers in the place "
        f"of attention; at the end entropy is {entropy:+.3f} nats and pass@8 {tries:+.3f} over GRPO.",
    )


_RHYTHMS: Mapping[str, Estimator] = {
    "GRPO": grpo(),
    "attention rhythm": attention_rhythm(min_length=1),
    "random numbers": chain(grpo(), amplify_by_attention(min_length=1, waad="noise", fai="noise")),
}
_READINGS: Mapping[str, Callable[[Curve], float]] = {
    "mean accuracy": area,
    "entropy": lambda curve: curve.entropy[-1],
    "pass@8": lambda curve: curve.pass8[-1],
}


def _sums(method: Estimator, seed: int, tokens: int) -> Curve:
    """At a rate at which the accuracy is still rising at the end."""
    return learn(
        Arithmetic().student(attention=True),
        method,
        tokens=tokens,
        evaluate_every=min(tokens, 16_000),
        seed=seed,
        rate=1e-4,
    )


def _size(quick: bool) -> tuple[int, int]:
    """Seeds and steps."""
    return (4, 20) if quick else (20, 100)


def _explored(
    method: Estimator, base: Estimator, entropy: str, seeds: int, steps: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Method less base at equal tokens; and what decides nothing."""
    decisive: dict[str, Estimate] = {}
    others: dict[str, Estimate] = {}
    for name, world in WORLDS.items():
        pairs = [(course(world, method, seed, steps), course(world, base, seed, steps)) for seed in range(seeds)]
        for what in (entropy, _PASS):
            decisive[f"{what} over GRPO, {name}"] = _at_end(pairs, what)
            others[f"{what} over GRPO at equal accuracy, {name}"] = _when_equal(pairs, what)
        others[f"accuracy over GRPO, {name}"] = _at_end(pairs, "accuracy")
    return decisive, others


def _at_end(pairs: Sequence[tuple[Course, Course]], what: str) -> Estimate:
    return mean_interval([a[-1][what] - b[-1][what] for a, b in pairs])


def _when_equal(pairs: Sequence[tuple[Course, Course]], what: str) -> Estimate:
    levels = [level_of_both(*pair) for pair in pairs]
    return mean_interval([when(a, x, what) - when(b, x, what) for (a, b), x in zip(pairs, levels, strict=True)])


def _told(decisive: Mapping[str, Estimate], others: Mapping[str, Estimate]) -> str:
    return (
        f"At equal tokens entropy changes by {_values(decisive, 'entropy')} nats on hard and easy problems, pass@{TRIES} by "
        f"{_values(decisive, _PASS)}, accuracy by {_values(others, 'accuracy over')}; at equal accuracy pass@{TRIES} by "
        f"{_values(others, _PASS)}"
    )


def _values(numbers: Mapping[str, Estimate], what: str) -> str:
    return " and ".join(f"{x.value:+.3f}" for name, x in numbers.items() if what in name)
