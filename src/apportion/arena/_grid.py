"""The cells there are: every world measured with its knobs turned, methods trained, claims of papers held against worlds."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from apportion.arena import claims
from apportion.arena._cells import Result
from apportion.arena._episodes import Episodes, World
from apportion.arena._learned import with_learned
from apportion.arena._learning import DEFAULT_LEARNERS, Student, learn, price
from apportion.arena._measures import Yardstick, estimate_of
from apportion.arena._methods import BARS, cost, every_method, missing
from apportion.arena._table_student import TableStudent
from apportion.credit import Estimator, grpo

Resolve = Callable[[str], Estimator]
"""From the text of a method that the arena does not know by name to the method."""


@dataclass(frozen=True)
class Measured:
    """Methods in one world with some knobs turned: one batch of episodes, every measure of every method.

    Args:
        world: with the knobs turned. turned: which, for people.
        methods: names of `every_method`, or whatever `resolve` understands.
    """

    name: str
    world: World
    turned: tuple[tuple[str, Any], ...]
    methods: tuple[str, ...]
    resolve: Resolve
    size: int = 8
    groups: int = 208
    seed: int = 0

    @property
    def path(self) -> str:
        """`measures/trees/verdict_error=0.4.json`; nothing turned is `base`."""
        return f"measures/{self.name}/{','.join(f'{k}={v}' for k, v in self.turned) or 'base'}.json"

    @property
    def _stamp(self) -> Result:
        return {"kind": "measures", "world": repr(self.world), "name": self.name, "turned": dict(self.turned)} | {
            "size": self.size,
            "groups": self.groups,
            "seed": self.seed,
        }

    def _standing(self, found: Result | None) -> dict[str, Any]:
        """Rows of an earlier sitting that still hold: of the same world and batch, and no other method by that name."""
        if found is None or any(found.get(k) != v for k, v in json.loads(json.dumps(self._stamp)).items()):
            return {}
        now = {name: repr(_method(name, self.resolve)) for name in self.methods}
        return {n: row for n, row in found["methods"].items() if row["expression"] == now.get(n, row["expression"])}

    def todo(self, found: Result | None) -> bool:
        """As `Cell.todo`."""
        return not self._standing(found).keys() >= set(self.methods)

    def compute(self, found: Result | None, folder: Path) -> Result:
        """As `Cell.compute`."""
        rows = self._standing(found)
        episodes = with_learned(self.world, self.world.episodes(self.groups, self.size, self.seed))
        yardstick = Yardstick(episodes)
        base = None if missing(grpo(), episodes.rollouts) else yardstick.samples(grpo()(episodes.rollouts))
        fresh = {n: _row(_method(n, self.resolve), episodes, yardstick, base) for n in self.methods if n not in rows}
        return self._stamp | {"truth": _truth(episodes), "methods": rows | fresh}


def _row(method: Estimator, episodes: Episodes, yardstick: Yardstick, base: Mapping[str, Tensor] | None) -> Result:
    row: Result = {"expression": repr(method), "reads": list(method.requires)}
    if lacking := missing(method, episodes.rollouts):
        return row | {"absent": lacking}
    found = yardstick.samples(method(episodes.rollouts))
    spent = cost(method, episodes)
    over = {} if base is None else {"over_grpo": _listed(found["cosine"] - base["cosine"])}  # paired: the same groups
    return row | {
        "measures": {name: _listed(values) for name, values in found.items()},
        **over,
        "cost": {"tokens": spent.tokens, "judge_calls": spent.judge_calls, "passes": spent.passes},
    }


def _listed(values: Tensor) -> list[float]:
    found = estimate_of(values)
    return [found.value, found.low, found.high]


def _truth(episodes: Episodes) -> Result:
    """What the batch was like."""
    r, errors = episodes.rollouts, episodes.errors
    at = r.action_mask
    return {
        "outcome": float(r.signals["outcome"].values.mean()),
        "tokens": float(at.sum() / r.num_trajectories),
        "decisive": float(episodes.decisive[at].double().mean()),
        "advantage": float(episodes.advantages[at].double().square().mean().sqrt()),
        "standard_error": 0.0 if errors is None else float(errors[at].double().square().mean().sqrt()),
    }


def _method(name: str, resolve: Resolve) -> Estimator:
    known = every_method()
    return known[name] if name in known else resolve(name)


# ---- learning and claims ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a method is trained in a world: the same for every method. `level` is the accuracy that is to be reached."""

    tokens: int
    rate: float
    level: float
    groups: int = 16
    size: int = 8


@dataclass(frozen=True)
class Trained:
    """One method trained in one world from the world's own policy, with one seed.

    Args:
        method: as in `Measured`.
        plan: the budget and the rate.
    """

    name: str
    world: World
    method: str
    resolve: Resolve
    seed: int
    plan: Plan

    @property
    def path(self) -> str:
        """`learning/rooms/grpo/3.json`."""
        method = re.sub(r"[^\w.=-]+", "_", self.method)
        return f"learning/{self.name}/{method}/{self.seed}.json"

    @property
    def _stamp(self) -> Result:
        method = repr(_method(self.method, self.resolve))
        what = {"world": repr(self.world), "name": self.name, "method": self.method, "expression": method}
        return {"kind": "learning", **what, "seed": self.seed, **asdict(self.plan)}

    def todo(self, found: Result | None) -> bool:
        """As `Cell.todo`."""
        return found is None or any(found.get(k) != v for k, v in self._stamp.items())

    def compute(self, found: Result | None, folder: Path) -> Result:
        """As `Cell.compute`; what a kill interrupts goes on from its last checkpoint."""
        method, student = _method(self.method, self.resolve), student_of(self.world, self.seed)
        plan = self.plan
        this_cell = sha256(repr(self._stamp).encode()).hexdigest()[:16]  # with its plan: another plan begins anew
        unfinished = folder / "unfinished" / this_cell
        if lacking := missing(method, student.sample(plan.groups, plan.size, self.seed)):
            return self._stamp | {"absent": lacking}
        spent = price(method, self.world.episodes(2, plan.size, self.seed))
        curve = learn(
            student,
            method,
            tokens=plan.tokens,
            rate=plan.rate,
            groups=plan.groups,
            size=plan.size,
            seed=self.seed,
            price=spent,
            checkpoint=unfinished,
        )
        shutil.rmtree(unfinished, ignore_errors=True)
        return self._stamp | {"curve": curve.to_json()}


@dataclass(frozen=True)
class Claimed:
    """What became of one claim of a paper."""

    claim: str
    quick: bool

    @property
    def path(self) -> str:
        """`claims/capo_localises.json`."""
        return f"claims/{self.claim}.json"

    def todo(self, found: Result | None) -> bool:
        """As `Cell.todo`; the long answer serves for the quick one too."""
        return found is None or (found["quick"] and not self.quick)

    def compute(self, found: Result | None, folder: Path) -> Result:
        """As `Cell.compute`."""
        by_name = {function.__name__: function for function in claims.CLAIMS}
        decided = by_name[self.claim](quick=self.quick)
        return {"kind": "claims", "name": self.claim, "quick": self.quick, "seed": 0} | _claimed(decided)


# ---- the grid -----------------------------------------------------------------------------------------------------------


@cache
def worlds() -> Mapping[str, tuple[World, Mapping[str, Sequence[Any]]]]:
    """The worlds by name, and the knobs that are turned in each, one at a time; `size` is that of the groups.

    The first values of a knob are those of `--quick`.
    """
    from apportion.arena.worlds import arithmetic, budgets, denoising, hackable, rooms, trees

    sizes, errors = (2, 32, 4, 16, 64), (0.4, 0.0, 0.2, 0.3)
    return {
        "trees": (
            trees.Trees(),
            {
                "size": sizes,
                "verdict_error": errors,
                "length": (24, 6, 48, 96),
                "where": ("early", "late"),
                "decisions": (1, 2, 4),
                "verifier_error": (0.1, 0.2, 0.4),
                "critic_error": (0.0, 0.02, 0.4),
            },
        ),
        "arithmetic": (
            arithmetic.Arithmetic(),
            {
                "size": (2, 32),
                "verdict_error": (0.4, 0.0),
                "terms": (6, 3),
                "correction": (0.0,),
                "padding": (0.4,),
                "critic_error": (0.02,),
            },
        ),
        "rooms": (
            rooms.Rooms(),
            {
                "size": sizes,
                "verdict_error": errors,
                "length": (20, 6, 40),
                "critic_error": (0.0, 0.02, 0.4),
                "observe": (False,),
            },
        ),
        "denoising": (
            denoising.Denoising(),
            {"size": sizes, "length": (16, 4), "verifier_error": (0.1, 0.3), "forks": ((),)},
        ),
        "hackable": (
            hackable.Hackable(),
            {
                "size": sizes,
                "verdict_error": errors,
                "length": (20, 6),
                "gaming": (0.0, 0.5),
                "filler": (0, 4),
            },
        ),
        "budgets": (budgets.Budgets(), {"size": sizes}),
    }


_QUICK = {"size": 1, "verdict_error": 1, "length": 1}  # how many values of a knob


def measured(
    *, quick: bool, methods: Sequence[str] | None = None, only: Sequence[str] | None = None, resolve: Resolve
) -> Iterator[Measured]:
    """The grid: every world as it is, and with each knob turned. The bars are always among the methods."""
    names = tuple(dict.fromkeys([*BARS, *(methods or every_method())]))
    for name in only or worlds():
        world, knobs = worlds()[name]
        yield Measured(name, world, (), names, resolve)
        for knob, values in knobs.items():
            for value in values[: _QUICK.get(knob, 0)] if quick else values:
                turned = ((knob, value),)
                if knob == "size":
                    yield Measured(name, world, turned, names, resolve, size=value)
                else:
                    yield Measured(name, _turned(world, knob, value), turned, names, resolve)


@cache
def classrooms() -> Mapping[str, tuple[World, Plan]]:
    """The worlds that are learned in. The rooms are harder than those that are measured, so that there is more to learn."""
    from apportion.arena.worlds import arithmetic, rooms

    return {
        "rooms": (rooms.Rooms(length=12, skill=0.75), Plan(tokens=400_000, rate=0.02, level=0.5)),
        "arithmetic": (arithmetic.Arithmetic(), Plan(tokens=102_400, rate=3e-4, level=0.8)),
    }


def trained(
    *,
    methods: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    resolve: Resolve,
) -> Iterator[Trained]:
    """Every method in every world that is learned in, once per seed; first one seed of everything, then the next."""
    for seed in seeds:
        for name in only or classrooms():
            for method in methods or DEFAULT_LEARNERS:
                yield Trained(name, classrooms()[name][0], method, resolve, seed, classrooms()[name][1])


def claimed(*, quick: bool) -> Iterator[Claimed]:
    """Every claim."""
    return (Claimed(function.__name__, quick) for function in claims.CLAIMS)


def student_of(world: World, seed: int) -> Student:
    """The policy of the world, to be trained."""
    made = getattr(world, "student", None)
    return made(seed) if made else TableStudent(cast(Any, world))


def _claimed(claim: claims.Claim) -> Result:
    numbers = {name: [e.value, e.low, e.high] for name, e in claim.numbers.items()}
    return asdict(claim) | {"numbers": numbers}


def _turned(world: Any, knob: str, value: Any) -> World:
    return cast(World, replace(world, **{knob: value}))
