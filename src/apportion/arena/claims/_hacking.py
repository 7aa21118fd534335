"""Training against a process reward model that can be gamed, for the claims about PURE and about Clip and Delta."""

from collections.abc import Mapping
from functools import cache

from apportion.arena._learning import learn
from apportion.arena._table_student import TableStudent
from apportion.arena.worlds.hackable import KINDS, Hackable
from apportion.credit import Estimator

_RATE = 0.05
WORLD = Hackable()


@cache
def habits_after(credit: Estimator, seeds: int, tokens: int) -> list[Mapping[str, float]]:
    """What policies do after so many tokens in the gamed world, exactly: for each seed steps of every kind, and accuracy."""
    found = []
    for seed in range(seeds):
        student = TableStudent(WORLD)
        learn(student, credit, tokens=tokens, seed=seed, rate=_RATE, evaluate_every=tokens)
        found.append(WORLD.habits(student.table))
    return found


def accuracy(habits: Mapping[str, float]) -> float:
    """The chance that a rollout is right."""
    return habits["accuracy"]


def padding(habits: Mapping[str, float]) -> float:
    """The share of steps that do nothing.

    >>> round(padding(WORLD.habits(WORLD.table)), 2)
    0.22
    """
    return (habits["empty"] + habits["repeated"]) / sum(habits[kind] for kind in KINDS)
