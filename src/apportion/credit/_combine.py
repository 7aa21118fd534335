"""Compositions: transforms after an estimator, weighted sums, and different estimators for different spans."""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from apportion.credit._base import COVERS, Estimator, Transform, check
from apportion.types import Cover, Credit, Rollouts, Signal


def chain(first: Estimator, *transforms: Transform) -> Estimator:
    """The estimator, then each transform in turn; the order matters and the printed form keeps it.

    Requires everything its parts require and has the widest of their scopes. Rounding happens once, at the end.

    Example:
        >>> from apportion.credit import clip, group_relative
        >>> chain(group_relative(), clip(limit=2.0))
        chain(group_relative(), clip(limit=2.0))
    """
    _check_kind("chain", first, Estimator)
    for step in transforms:
        _check_kind("chain", step, Transform)

    def run(rollouts: Rollouts) -> Credit:
        credit = first.exact(rollouts)
        for step in transforms:
            credit = step.run(credit, rollouts)
        return credit

    members: tuple[Estimator | Transform, ...] = (first, *transforms)
    laws = reduce(lambda before, step: step.laws_after(before), transforms, first.laws)
    return Estimator(
        first.name,
        f"chain({', '.join(m.key for m in members)})",
        f"chain({', '.join(map(repr, members))})",
        run,
        _all_required(members),
        _widest(members),
        max(m.needs_group_of for m in members),
        laws,
    )


def add(*terms: tuple[float, Estimator]) -> Estimator:
    """Weighted sum of credits: `A = sum of weight * A_k`, over the union of the masks.

    A position outside one term's mask gets nothing from that term. Parts carry the name of their term in front
    (`group_relative.outcome`). At most one term may bring returns for a critic.

    Example:
        >>> from apportion.credit import grpo, tempo
        >>> add((1.0, grpo()), (0.2, tempo())).requires
        ('signals.outcome', 'tokens')
    """
    if not terms:
        raise TypeError("add needs at least one (weight, estimator); got none.")
    for weight, term in terms:
        _check_kind("add", term, Estimator)
        if not isinstance(weight, int | float):
            raise TypeError(f"add needs (weight, estimator) pairs; got a {type(weight).__name__} as weight.")

    def run(rollouts: Rollouts) -> Credit:
        credits = [term.exact(rollouts).scaled(float(weight), rollouts) for weight, term in terms]
        return _united(credits, [t.name for _, t in terms], rollouts, "add")

    members = [term for _, term in terms]
    return Estimator(
        "add",
        f"add({', '.join(f'({float(w)!r}, {t.key})' for w, t in terms)})",
        f"add({', '.join(f'({w!r}, {t!r})' for w, t in terms)})",
        run,
        _all_required(members),
        _widest(members),
        max(m.needs_group_of for m in members),
        _shared_laws(members),
    )


def partition(by: Mapping[str, Estimator]) -> Estimator:
    """A different estimator for each of several disjoint span sets; positions in none get mask False.

    Example:
        >>> from apportion.credit import dr_grpo, signed_outcome
        >>> partition({"think": signed_outcome(), "answer": dr_grpo()}).requires
        ('spans.think', 'spans.answer', 'signals.outcome')
    """
    if not by:
        raise TypeError("partition needs {spans_name: estimator}; got nothing.")
    for member in by.values():
        _check_kind("partition", member, Estimator)
    members = list(by.values())
    requires = tuple(dict.fromkeys((*(f"spans.{name}" for name in by), *_all_required(members))))

    def run(rollouts: Rollouts) -> Credit:
        check(rollouts, "partition", [f"spans.{name}" for name in by], "row")
        inside = {name: rollouts.span_ids(name) >= 0 for name in by}
        for one, other in combinations(by, 2):
            if bool((inside[one] & inside[other]).any()):
                raise ValueError(
                    f"partition needs disjoint spans, but {one!r} and {other!r} overlap. Cut one, or use add."
                )
        credits = [est.exact(rollouts).narrowed(inside[name]) for name, est in by.items()]
        return _united(credits, list(by), rollouts, "partition")

    return Estimator(
        "partition",
        f"partition({{{', '.join(f'{k!r}: {v.key}' for k, v in by.items())}}})",
        f"partition({{{', '.join(f'{k!r}: {v!r}' for k, v in by.items())}}})",
        run,
        requires,
        _widest(members),
        max(m.needs_group_of for m in members),
        _shared_laws(members),
    )


def _united(credits: list[Credit], names: list[str], rollouts: Rollouts, by: str) -> Credit:
    """Sum of credits, each inside its own mask, with parts and notes named after their term."""
    mask = torch.stack([c.mask for c in credits]).any(0)
    total: Tensor = torch.stack([c.advantages for c in credits]).sum(0)
    returns = [c.returns for c in credits if c.returns is not None]
    if len(returns) > 1:
        raise ValueError(f"{by} got returns from {len(returns)} terms, but a critic has one target. Keep one critic.")
    parts: dict[str, Signal] = {}
    notes: dict[str, float] = {}
    for name, credit in zip(_distinct(names), credits, strict=True):
        whole = bool((credit.mask == mask).all())
        for key, part in credit.parts.items():
            parts[f"{name}.{key}"] = part if whole else _inside(part, credit.mask, rollouts)
        notes.update({f"{name}.{key}": value for key, value in credit.notes.items()})
    return Credit(total, mask, parts, returns[0] if returns else None, notes)


def _inside(part: Signal, mask: Tensor, rollouts: Rollouts) -> Signal:
    return Signal(torch.where(mask, rollouts.at_tokens(part), 0.0), "token")


def _distinct(names: list[str]) -> list[str]:
    """The names, with 2, 3 ... behind those that repeat."""
    return [n if not names[:i].count(n) else f"{n}{names[:i].count(n) + 1}" for i, n in enumerate(names)]


def _all_required(members: Sequence[Estimator | Transform]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for m in members for name in m.requires))


def _widest(members: Sequence[Estimator | Transform]) -> Cover:
    return max((m.scope for m in members), key=COVERS.index)


def _shared_laws(members: Sequence[Estimator]) -> tuple[str, ...]:
    """A sum keeps what all its terms keep; a constant added inside some masks only is no longer one constant."""
    return tuple(law for law in ("shift", "equal") if all(law in m.laws for m in members))


def _check_kind(by: str, member: object, kind: type) -> None:
    if not isinstance(member, kind):
        hint = f"Call it first: {member.__name__}()." if hasattr(member, "__name__") else "See apportion.credit."
        got = getattr(member, "__name__", type(member).__name__)
        raise TypeError(f"{by} needs an {kind.__name__} here; got {got}. {hint}".replace("an Transform", "a Transform"))
