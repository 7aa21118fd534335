"""Learning: the same start, the same budget of tokens, another method; what comes of it, and how sure that is."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._measures import Estimate
from apportion.arena._methods import cost
from apportion.credit import Estimator
from apportion.losses import Outputs, PolicyGradient, totals_of
from apportion.train.checkpoint import load_checkpoint, save_checkpoint
from apportion.types import Credit, Rollouts

COLLAPSE = 0.1
"""An accuracy below this share of the best one before it is a collapse."""

LOSS = PolicyGradient(aggregation="sequence_mean_token_sum")
"""One for all methods: the mean over rollouts of the sum over tokens of A_t d log pi, which is the policy gradient itself.
Other means divide by lengths, which would be a second idea of credit on top of the method's. One update is made per
batch, so the ratio is 1 and nothing is ever clipped."""


class Student(Protocol):
    """A policy that can be trained in a world."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""

    def sample(self, groups: int, size: int, seed: int) -> Rollouts:
        """Rollouts of training problems, with the signals of the world."""

    def logprobs(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """log pi of what was sampled, in nats, with gradient."""

    def evaluate(self, seed: int) -> Mapping[str, float]:
        """On held-out problems where the world has them: "accuracy" (sampled), "pass@8", "entropy" (mean, nats), "length"."""


DEFAULT_LEARNERS: Mapping[str, str] = {
    "exact_advantage": "the upper bar, where the world knows it",
    "random_credit": "the lower bar",
    "grpo": "what most people run",
    "rloo": "neither bias nor deviation; up to a factor, which Adam takes out, also dr_grpo",
    "nsr": "learns from failures alone",
    "tempo": "values of shared beginnings, at no cost",
    "gigpo": "compares what was done in the same state, at no cost; needs turns",
    "gae": "a critic, which in a world of tables knows the policy as it is, up to its error",
    "capo": "verdicts of a judge about steps",
    "pure": "rewards of steps, of which the smallest counts",
}
"""The methods that are trained by default, by their names in `every_method`, and why each is worth the time: the two bars
and eight others. A world trains those that find there what they read."""


# ---- the curve --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collapse:
    """When learning broke, and how it showed."""

    tokens: int
    why: str


@dataclass(frozen=True)
class Curve:
    """What a policy could do when so many tokens had been spent. NaN = not measured.

    Args:
        tokens: the marks. The policy at a mark has spent that much or, by less than a batch, less; never more.
        accuracy: chance that a sampled response is right.
        pass8: chance that one of eight is.
        entropy: per token, on the policy's own responses, in nats.
        length: tokens of a response.
        price: tokens spent for each token sampled, see `price`.
        collapsed: the first collapse, if there was one.
    """

    tokens: tuple[int, ...]
    accuracy: tuple[float, ...]
    pass8: tuple[float, ...]
    entropy: tuple[float, ...]
    length: tuple[float, ...]
    price: float = 1.0
    collapsed: Collapse | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; NaN is None."""
        plain = asdict(self)
        for name in _MEASURED:
            plain[name] = [None if math.isnan(x) else x for x in plain[name]]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Curve":
        """The inverse of `to_json`."""
        measured = {k: tuple(math.nan if x is None else float(x) for x in plain[k]) for k in _MEASURED}
        collapsed = None if plain["collapsed"] is None else Collapse(**plain["collapsed"])
        return cls(tokens=tuple(plain["tokens"]), **measured, price=plain["price"], collapsed=collapsed)


_MEASURED = ("accuracy", "pass8", "entropy", "length")


def area(curve: Curve, up_to: int | None = None) -> float:
    """The mean accuracy on the way to `up_to` tokens (default: the last mark), straight lines between marks.

    A mark without a measurement counts as accuracy 0: the policy had broken by then.

    Example:
        >>> curve = Curve((0, 100, 200), (0.0, 1.0, 1.0), *[(0.0,) * 3] * 3)
        >>> area(curve), area(curve, 100)
        (0.75, 0.5)
    """
    accuracy = _accuracy(curve)
    end = curve.tokens[-1] if up_to is None else up_to
    if not 0 < end <= curve.tokens[-1]:
        raise ValueError(f"up_to must lie between 1 and the curve's last mark {curve.tokens[-1]}; got {end}.")
    total = 0.0
    for (t0, a0), (t1, a1) in _pieces(curve.tokens, accuracy):
        stop = min(t1, end)
        if stop > t0:
            total += (stop - t0) * (a0 + (a1 - a0) * (stop - t0) / (t1 - t0) / 2)
    return total / (end - curve.tokens[0])


def tokens_to(curve: Curve, level: float) -> float:
    """The tokens at which the accuracy first reached `level`, on straight lines between marks; NaN = never.

    Example:
        >>> tokens_to(Curve((0, 100, 200), (0.0, 0.5, 1.0), *[(0.0,) * 3] * 3), 0.75)
        150.0
    """
    accuracy = _accuracy(curve)
    if accuracy[0] >= level:
        return float(curve.tokens[0])
    for (t0, a0), (t1, a1) in _pieces(curve.tokens, accuracy):
        if a1 >= level:
            return t0 + (t1 - t0) * (level - a0) / (a1 - a0)
    return math.nan


def _accuracy(curve: Curve) -> list[float]:
    return [0.0 if math.isnan(a) else a for a in curve.accuracy]


def _pieces(tokens: Sequence[int], values: Sequence[float]) -> list[tuple[tuple[int, float], tuple[int, float]]]:
    points = list(zip(tokens, values, strict=True))
    return list(itertools.pairwise(points))


# ---- the loop ---------------------------------------------------------------------------------------------------------


def price(method: Estimator, episodes: Episodes) -> float:
    """Tokens spent for each token that the policy samples: 1, and what the method needs beyond, as a share of the rollouts.

    A reply of a judge counts as many tokens as the rollout it speaks about. Passes that sample nothing (critic, reference,
    process reward model) are not counted.

    Example:
        >>> from apportion.arena import Trees
        >>> from apportion.credit import capo, grpo
        >>> episodes = Trees().episodes(groups=8, size=4, seed=0)
        >>> price(grpo(), episodes), price(capo(), episodes)
        (1.0, 4.0)
    """
    further, r = cost(method, episodes), episodes.rollouts
    return 1.0 + further.judge_calls + further.tokens * r.num_trajectories / max(int(r.action_mask.sum()), 1)


def learn(
    student: Student,
    credit: Estimator,
    *,
    tokens: int,
    seed: int,
    rate: float,
    evaluate_every: int | None = None,
    groups: int = 16,
    size: int = 8,
    price: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: Path | None = None,
    save_seconds: float = 20.0,
) -> Curve:
    """Sample, credit, update, until the tokens are spent.

    A step depends on the weights, the seed and the number of the step, nothing else. Adam's step does not depend on the
    size of the gradient, so methods whose credit is twice as large do not learn twice as fast: what is compared is where
    credit goes, not its unit, and one rate serves all. A loss or gradient that is not finite ends the training before the
    weights change; the remaining marks are NaN. An accuracy below a tenth of the best before it is noted as a collapse, and
    training goes on.

    Args:
        tokens: the budget; each sampled token costs `price` (the function of this name).
        rate: of Adam.
        evaluate_every: tokens from mark to mark, a divisor of `tokens`; default: a twentieth.
        on_step: called after every step with its number and the tokens spent.
        checkpoint: a folder. With it, a run that was killed and is started again ends with the same curve.
        save_seconds: time between two checkpoints.
    """
    every = evaluate_every or max(tokens // 20, 1)
    if tokens < 1 or tokens % every:
        raise ValueError(f"tokens must be a positive multiple of evaluate_every; got {tokens} and {every}. Change one.")
    settings = {"tokens": tokens, "seed": seed, "rate": rate, "evaluate_every": every, "groups": groups, "size": size}
    run = _Run(student, {"credit": credit.key, **settings, "price": price}, checkpoint)
    saved = time.monotonic()
    while len(run.rows) <= tokens // every:
        if run.broken:
            run.rows.append([math.nan] * len(_MEASURED))
            continue
        rollouts = student.sample(groups, size, _seed(seed, run.step + 1))
        spent = run.spent + price * int(rollouts.action_mask.sum())
        run.mark(range(len(run.rows) * every, min(math.ceil(spent), tokens + 1), every), _seed(seed, 0))
        if spent > tokens:
            break
        run.update(rollouts, credit(rollouts))
        run.step, run.spent = run.step + 1, spent
        if checkpoint and time.monotonic() - saved >= save_seconds:
            run.save()
            saved = time.monotonic()
        if on_step:
            on_step(run.step, run.spent)
    if checkpoint:
        run.save()
    columns = dict(zip(_MEASURED, map(tuple, zip(*run.rows, strict=True)), strict=True))
    return Curve(
        tokens=tuple(range(0, tokens + 1, every)),
        **columns,
        price=price,
        collapsed=Collapse(*run.collapsed) if run.collapsed else None,
    )


def _seed(seed: int, step: int) -> int:
    """Of the random numbers of one step; 0 is evaluation."""
    return (seed * 1_000_003 + step) % 2**63


_HELD = ("step", "spent", "rows", "collapsed", "broken")


class _Run:
    """What changes from step to step, and what a checkpoint holds of it."""

    def __init__(self, student: Student, settings: Mapping[str, Any], folder: Path | None):
        self.student, self.settings, self.folder = student, dict(settings), folder
        self.optimizer = torch.optim.Adam(student.parameters(), lr=settings["rate"], betas=(0.9, 0.99))
        self.step, self.spent = 0, 0.0
        self.rows: list[list[float]] = []  # of each mark, the columns _MEASURED
        self.collapsed: tuple[int, str] | None = None
        self.broken = False
        if folder and (found := load_checkpoint(folder)):
            self._load(found)

    def mark(self, marks: range, seed: int) -> None:
        """Measure the policy as it is, for every mark that it stands at."""
        if not marks:
            return
        found = self.student.evaluate(seed)
        row = [float(found[name]) for name in ("accuracy", "pass@8", "entropy", "length")]
        best = max((r[0] for r in self.rows), default=0.0)
        if not self.collapsed and row[0] < COLLAPSE * best:
            self.collapsed = (marks[0], f"accuracy fell from {best:.2g} to {row[0]:.2g}")
        self.rows += [list(row) for _ in marks]

    def update(self, rollouts: Rollouts, credit: Credit) -> None:
        """One step of Adam; or none, and the end, if the gradient is not finite."""
        self.optimizer.zero_grad()
        loss, _ = LOSS(Outputs(self.student.logprobs(rollouts)), rollouts, credit, totals_of(rollouts, credit))
        if loss.requires_grad:
            loss.backward()
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        if all(bool(g.isfinite().all()) for g in [loss, *gradients]):
            self.optimizer.step()
        else:
            self.broken = True
            self.collapsed = self.collapsed or (int(self.spent), "the gradient is not finite")

    def save(self) -> None:
        """Write a checkpoint; killed during it, the one before is still there."""
        assert self.folder is not None
        state = {name: getattr(self, name) for name in ("settings", *_HELD)} | {
            "weights": [p.detach() for p in self.student.parameters()],
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder, self.step, state)

    def _load(self, found: Mapping[str, Any]) -> None:
        changed = [k for k, v in self.settings.items() if found["settings"].get(k) != v]
        if changed:
            name = changed[0]
            raise ValueError(
                f"the checkpoint in {self.folder} was made with {name}={found['settings'].get(name)!r}, but the run goes on "
                f"with {self.settings[name]!r}. Use the same settings, or another folder."
            )
        for name in _HELD:
            setattr(self, name, found[name])
        with torch.no_grad():
            for p, w in zip(self.student.parameters(), found["weights"], strict=True):
                p.copy_(w)
        self.optimizer.load_state_dict(found["optimizer"])


# ---- several seeds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Curves of several seeds: means with 95 % t intervals over the seeds (a bootstrap of five values is too narrow).

    Args:
        seeds: how many.
        area: mean accuracy on the way.
        final: accuracy at the end; pass8: pass@8 there.
        tokens_to: tokens to the level, a seed that never reached it counted with the whole budget: a lower bound where
            `reached` is below 1.
        reached, collapsed: share of the seeds.
    """

    seeds: int
    area: Estimate
    final: Estimate
    pass8: Estimate
    tokens_to: Estimate
    reached: float
    collapsed: float


def summary(curves: Mapping[int, Curve], *, level: float, up_to: int | None = None) -> Summary:
    """What the curves of a method, by seed, come to; `level` is the accuracy of `tokens_to`."""
    found = [_figures(c, level, up_to) for c in curves.values()]
    means = {name: mean_interval([f[name] for f in found]) for name in found[0]}
    return Summary(
        seeds=len(found),
        **means,
        reached=sum(not math.isnan(tokens_to(c, level)) for c in curves.values()) / len(found),
        collapsed=sum(c.collapsed is not None for c in curves.values()) / len(found),
    )


def difference(
    curves: Mapping[int, Curve], baseline: Mapping[int, Curve], *, level: float, up_to: int | None = None
) -> dict[str, Estimate]:
    """Method minus baseline, seed by seed, for area, final, pass8 and tokens_to: mean with its 95 % t interval."""
    seeds = sorted(curves.keys() & baseline.keys())
    if not seeds:
        raise ValueError(f"no seed is in both: {sorted(curves)} and {sorted(baseline)}. Run the same seeds.")
    pairs = [(_figures(curves[s], level, up_to), _figures(baseline[s], level, up_to)) for s in seeds]
    return {name: mean_interval([a[name] - b[name] for a, b in pairs]) for name in pairs[0][0]}


def _figures(curve: Curve, level: float, up_to: int | None) -> dict[str, float]:
    reached = tokens_to(curve, level)
    return {
        "area": area(curve, up_to),
        "final": _accuracy(curve)[-1],
        "pass8": 0.0 if math.isnan(curve.pass8[-1]) else curve.pass8[-1],
        "tokens_to": float(curve.tokens[-1]) if math.isnan(reached) else reached,
    }


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t for 1, 2, ... degrees of freedom."""


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with its 95 % t interval; no interval for a single value.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])
        Estimate(value=2.0, low=-0.484..., high=4.484...)
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96 + 2.55 / (n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)
