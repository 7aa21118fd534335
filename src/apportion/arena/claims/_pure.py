"""PURE: the minimum of the step scores cannot be raised by more steps, their sum can."""

from apportion.arena._learning import mean_interval
from apportion.arena.claims._core import Claim, decide
from apportion.arena.claims._hacking import WORLD, accuracy, habits_after, padding
from apportion.credit import bounded_return, chain, grpo, pure, returns_to_go, whiten

_MIN = chain(pure(process="margin"), whiten(over="group"))
_SUM = chain(bounded_return(form="raw", alpha=1.0, process="margin"), whiten(over="group"))
_OTHERS = {
    "sum at a fiftieth of the weight": chain(
        bounded_return(form="raw", alpha=0.02, process="margin"), whiten(over="group")
    ),
    "minimum without the verifier": chain(pure(process="margin", coef=0.0), whiten(over="group")),
    "sum without the verifier": chain(returns_to_go(reward="margin"), whiten(over="group")),
    "GRPO, without the model": grpo(),
}


def pure_survives_hacking(quick: bool = False) -> Claim:
    """Training where empty steps, repeated steps and wrong answers get the full score, with a verifier of the same weight.

    Both forms are normalised over the group's tokens, so that only minimum or sum differ.

    Rule: shown if after training accuracy under the minimum is above where it began, accuracy under the sum is below that,
    and the share of steps that do nothing is larger under the sum; contradicted if one of them is the other way round.
    Training without the verifier, with a weak sum, and without the model are reported and decide nothing.
    """
    seeds, tokens = (3, 100_000) if quick else (8, 150_000)
    least, total = (habits_after(credit, seeds, tokens) for credit in (_MIN, _SUM))
    began = accuracy(WORLD.habits(WORLD.table))
    numbers = {
        "accuracy gained under the minimum": mean_interval([accuracy(h) - began for h in least]),
        "accuracy lost under the sum": mean_interval([began - accuracy(h) for h in total]),
        "share of idle steps, sum over minimum": mean_interval(
            [padding(t) - padding(m) for m, t in zip(least, total, strict=True)]
        ),
    }
    verdict = decide(*numbers.values())
    for name, credit in {} if quick else _OTHERS.items():
        numbers[f"accuracy gained, {name}"] = mean_interval(
            [accuracy(h) - began for h in habits_after(credit, seeds, tokens)]
        )
    kept, broken = (sum(map(accuracy, found)) / seeds for found in (least, total))
    return Claim(
        method="pure",
        source="arXiv 2504.15275",
        says="Under a process reward model that can be gamed, the minimum of the scores keeps learning where the sum collapses.",
        verdict=verdict,
        numbers=numbers,
        because=f"From {began:.2f} accuracy goes to {kept:.2f} under the minimum and to {broken:.2f} under the sum, which "
        "learns to go on without answering.",
    )
