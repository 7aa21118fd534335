"""Which methods enter the arena: every exported one, by the name it is exported under."""

from functools import cache

from apportion import credit
from apportion.arena._bars import exact_advantage, random_credit
from apportion.arena._episodes import Cost, Episodes
from apportion.credit import Estimator, chain, grpo
from apportion.credit._base import held
from apportion.types import Rollouts

BARS = ("exact_advantage", "random_credit")
"""What every method stands between."""

_READS = {"pure": {"process": "margin"}, "process_min": {"process": "margin"}}
"""Methods whose signal has another name in the worlds: PURE reads scores from -1 to 1."""


@cache
def every_method() -> dict[str, Estimator]:
    """The two bars; every estimator of `apportion.credit` with its defaults (but `_READS`); every transform, after GRPO.

    Example:
        >>> list(every_method())[:3], every_method()["rloo"]
        (['exact_advantage', 'random_credit', 'attention_rhythm'], group_relative(reward='outcome', baseline='leave_one_out', scale=None))
    """
    exported = {name: getattr(credit, name) for name in sorted(credit.__all__)}
    roles = {name: getattr(function, "role", None) for name, function in exported.items()}
    found = dict(zip(BARS, (exact_advantage(), random_credit()), strict=True))
    found |= {name: f(**_READS.get(name, {})) for name, f in exported.items() if roles[name] in ("estimator", "alias")}
    return found | {name: chain(grpo(), f()) for name, f in exported.items() if roles[name] == "transform"}


def missing(method: Estimator, rollouts: Rollouts) -> list[str]:
    """What the method reads that these rollouts do not have."""
    return [needed for needed in method.requires if held(rollouts, needed) is None]


def cost(method: Estimator, episodes: Episodes) -> Cost:
    """What the method needs per rollout beyond its rollouts: the costs of everything it reads, added up."""
    return sum((episodes.costs.get(needed, Cost()) for needed in method.requires), Cost())
