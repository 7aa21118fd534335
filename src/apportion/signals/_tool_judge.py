"""A judge without a model: recompute every equation that a step writes, and see whether it gets on with the question."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

from apportion.signals._equations import (
    Equation,
    Expression,
    Number,
    Operation,
    equations,
    expression,
    false_mark,
    numbers,
    operands,
)
from apportion.signals._split import step_texts, steps_by_trajectory
from apportion.types import Rollouts, Signal


@dataclass(frozen=True)
class ToolJudge:
    """What `tool_judge` returns."""

    chained: bool
    question_numbers: bool
    no_equation: float

    provides = ("signals.judge",)
    requires = ("spans.step",)

    def __repr__(self) -> str:
        shown = [f"{name}=True" for name in ("chained", "question_numbers") if getattr(self, name)]
        if not _same(self.no_equation, _default(self.chained)):
            shown.append(
                "no_equation=float('nan')" if math.isnan(self.no_equation) else f"no_equation={self.no_equation}"
            )
        return f"tool_judge({', '.join(shown)})"

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"judge": [S, 1]}`, one critique that is always the same: 1 = the step is wrong, 0 = it is not."""
        questions = _questions(rollouts) if self.question_numbers else [""] * rollouts.num_trajectories
        texts = step_texts(rollouts)
        values = torch.full((len(texts), 1), torch.nan)
        for question, steps in zip(questions, steps_by_trajectory(rollouts), strict=True):
            for s, verdict in zip(steps, self.verdicts(question, [texts[s] for s in steps]), strict=True):
                values[s, 0] = verdict
        return {"judge": Signal(values.to(rollouts.device), "step", ("critiques",))}

    def verdicts(self, question: str, steps: Sequence[str]) -> list[float]:
        """One verdict per step of one response: 1 = wrong, 0 = not wrong, NaN = not measured.

        >>> tool_judge(chained=True, question_numbers=True).verdicts("7+5-3=?", ["7+5=12", "1+1=2", "12-3=9"])
        [0.0, 1.0, 0.0]
        """
        rule = self._rule(question)
        return [self._verdict(rule, step, last=n + 1 == len(steps)) for n, step in enumerate(steps)]

    def _verdict(self, rule: "_Rule", step: str, last: bool) -> float:
        found = equations(step)
        if not found:
            stated = set(numbers(step))
            concludes = last and rule.answer is not None and stated == {abs(rule.answer)}
            return 0.0 if concludes else self.no_equation
        followed = [rule.follow(e) for e in found]
        right = all(followed) and all(e.true for e in found) and not false_mark(step)
        return 0.0 if right else 1.0

    def _rule(self, question: str) -> "_Rule":
        if not self.question_numbers:
            return _Continue() if self.chained else _Anything()
        asked = expression(question) if self.chained else None
        tree = None if asked is None else _tree(asked)
        return _Reduce(tree) if tree is not None else _Take(numbers(question), self.chained)


def tool_judge(chained: bool = False, question_numbers: bool = False, no_equation: float | None = None) -> ToolJudge:
    """Recompute every equation in every step; a step is wrong if one of its equations is.

    An equation is right if it is true and keeps the rules that are switched on. True: both sides are equal as exact
    fractions; a side that is one decimal number may be rounded to the nearest. What counts as an equation is said in
    `_equations`: numbers and signs only, no words.

    - `chained`: the left side contains the result of the equation before it. (If that one was wrong, the result of the
      last right one will do as well.)
    - `question_numbers`: every number on the left is taken from what is left to use: the question's numbers, once
      each, and the results so far, once each.
    - both, and the question is an arithmetic expression ("7+5-3+6=?"): the strongest rule. What is left of the
      question is kept as an expression, and each equation must carry out exactly one operation of it such that putting
      the written result in its place keeps the expression's value: precedence, parentheses and signs count, the order
      among equal terms does not. Then a true but irrelevant equation, a repeated step, a skipped one, a result
      with no work behind it and a giant step that does everything at once are all wrong.

    With any rule on, an equation needs an operation on one side and its result alone on the other.
    Each step answers for itself. A false result is carried on as written, so steps that continue it consistently are
    not wrong. After an equation that breaks a rule, those of its operands that were there count as used and the written
    result takes their place; if none was there, nothing changes.

    A step without an equation: NaN by default (this judge cannot read prose); with `chained` wrong, because it does
    nothing, unless it is the last step and its only number, sign aside, is the result reached (the answer line; under
    the strongest rule only once the whole expression is worked out).

    Source: the tool-verified judge of this project's arithmetic tasks; the signal is CAPO's (arXiv 2508.02298), K = 1.
    Reads: meta["pieces"], spans["step"], meta["question"] with `question_numbers`. Scope: row. Unit: step.
    Degenerate: no steps, an empty signal [0, 1].

    Args:
        chained: see above. question_numbers: see above.
        no_equation: the verdict on a step without an equation, instead of the default above.

    Raises:
        ValueError: meta["question"] is missing, when `question_numbers` needs it; `no_equation` is not 0, 1 or NaN.
    """
    if no_equation is None:
        no_equation = _default(chained)
    if not (no_equation in (0, 1) or math.isnan(no_equation)):
        raise ValueError(f"tool_judge needs no_equation to be 0 (not wrong), 1 (wrong) or NaN; got {no_equation}.")
    return ToolJudge(chained, question_numbers, float(no_equation))


def _default(chained: bool) -> float:
    return 1.0 if chained else math.nan


def _same(x: float, y: float) -> bool:
    return x == y or (math.isnan(x) and math.isnan(y))


def _questions(rollouts: Rollouts) -> list[str]:
    """The question of every trajectory."""
    column = rollouts.meta.get("question")
    if column is None:
        raise ValueError(
            'tool_judge(question_numbers=True) needs meta["question"], which this batch lacks. '
            "Give the question's text for every row, or judge with question_numbers=False."
        )
    out = [""] * rollouts.num_trajectories
    for n, text in zip(rollouts.trajectory_ids.tolist(), column, strict=True):
        out[n] = str(text)
    return out


# ---- the rules, each with its own memory of one response ----------------------------------------------------------------


class _Rule(Protocol):
    @property
    def answer(self) -> Fraction | None:
        """The result that an answer line may state now."""

    def follow(self, equation: Equation) -> bool:
        """Whether the equation keeps the rule; remembers what it did."""


class _Anything:
    answer = None

    def follow(self, equation: Equation) -> bool:
        return True


@dataclass
class _Continue:
    """`chained` alone."""

    answer: Fraction | None = None
    right: Fraction | None = None
    """The result of the last equation that kept the rule."""

    def follow(self, equation: Equation) -> bool:
        if equation.work is None:
            return False
        left, result = equation.work
        kept = self.answer is None or bool({self.answer, self.right} & set(operands(left)))
        self.answer = result.value
        if kept and equation.true:
            self.right = result.value
        return kept


class _Take:
    """`question_numbers`: operands come out of a bag, results go in."""

    def __init__(self, found: Sequence[Fraction], chained: bool) -> None:
        self.bag = Counter(abs(x) for x in found)
        self.chain = _Continue() if chained else None
        self.answer: Fraction | None = None

    def follow(self, equation: Equation) -> bool:
        if equation.work is None:
            return False
        left, result = equation.work
        used = Counter(abs(x) for x in operands(left))
        there = used & self.bag
        kept = there == used
        if not there:
            return False
        self.bag = self.bag - there + Counter([abs(result.value)])
        self.answer = result.value
        return (self.chain is None or self.chain.follow(equation)) and kept


# ---- the strongest rule: reduce the question's expression ---------------------------------------------------------------


@dataclass(eq=False)
class _Item:
    child: "Fraction | _Tree"
    power: int
    """The sign of a term, or the exponent of a factor: 1 or -1."""


@dataclass(eq=False)
class _Tree:
    """A sum of terms ("+") or a product of factors ("*")."""

    kind: str
    items: list[_Item]


@dataclass(eq=False)
class _Leaf:
    item: _Item
    value: Fraction
    owner: _Tree
    depth: int


class _Reduce:
    """What is left of the question's expression."""

    def __init__(self, tree: _Tree) -> None:
        self.root = tree

    @property
    def answer(self) -> Fraction | None:
        """The one number that is left, once the expression is worked out."""
        only, *more = self.root.items
        return None if more or isinstance(only.child, _Tree) else only.child * only.power

    def follow(self, equation: Equation) -> bool:
        if equation.work is None:
            return False
        left, result = equation.work
        trees = {id(leaf.owner): leaf.owner for leaf in _leaves(self.root)}.values()
        legal = any(_reduced(tree, left, result.value) for tree in trees)
        if not legal:
            self._carry_on(operands(left), result.value)
        _collapse(self.root)
        return legal

    def _carry_on(self, used: Sequence[Fraction], result: Fraction) -> None:
        """After a broken rule: the operands that were there are used, the written result takes their place.

        The place is that of the most tightly bound of them, and of the leftmost of these: where the result ends up for
        a reader who forgets precedence. It keeps the sign of that place, unless the left operand was made up.
        """
        leaves = _leaves(self.root)
        found: list[int] = []
        for x in used:
            spots = (i for i, leaf in enumerate(leaves) if i not in found and abs(leaf.value) == abs(x))
            found += [i for i in [next(spots, None)] if i is not None]
        if not found:
            return
        known_left = abs(leaves[found[0]].value) == abs(used[0])
        at = max(found, key=lambda i: (leaves[i].depth, -i))
        for i in found:
            if i != at:
                leaves[i].owner.items.remove(leaves[i].item)
        place = leaves[at].item
        place.child, place.power = result, place.power if known_left else 1


def _tree(e: Expression) -> _Tree | None:
    """The expression as nested sums and products; None if it contains a power."""
    if isinstance(e, Number):
        return _Tree("+", [_Item(e.value, 1)])
    if e.op == "^":
        return None
    kind = "+" if e.op in "+-" else "*"
    items: list[_Item] = []
    for side, power in ((e.left, 1), (e.right, -1 if e.op in "-/" else 1)):
        inner = _tree(side)
        if inner is None:
            return None
        if isinstance(side, Number) and side.value == 0 and side is e.left and isinstance(e.right, Operation):
            continue  # the sign before a parenthesis is read as 0 - (...)
        same = inner.kind == kind or len(inner.items) == 1
        items += [_Item(i.child, i.power * power) for i in inner.items] if same else [_Item(inner, power)]
    return _Tree(kind, items)


def _leaves(tree: _Tree, depth: int = 0) -> list[_Leaf]:
    """The numbers that are left, each in the sum or product it belongs to."""
    out: list[_Leaf] = []
    for item in tree.items:
        if isinstance(item.child, _Tree):
            out += _leaves(item.child, depth + 1)
        else:
            out.append(_Leaf(item, item.child, tree, depth))
    return out


def _reduced(tree: _Tree, left: Operation, result: Fraction) -> bool:
    """Carry out `left`, one operation on two numbers of this sum or product, and put `result` in their place.

    The two may stand there as written or both inverted: in 9-3-4, "3+4=7" leaves 9-7; in 9-5+3, "5-3=2" leaves 9-2.
    But not if one of them is the plain first: in 7-5+1, "5-7=-2" would leave -(-2)+1, which nobody means by it.
    """
    if not (isinstance(left.left, Number) and isinstance(left.right, Number)):
        return False
    if left.op == "^" or (left.op in "+-") != (tree.kind == "+"):
        return False
    wanted = [(left.left.value, 1), (left.right.value, -1 if left.op in "-/" else 1)]
    for turn in (1, -1):
        pair = _pair(tree, [(x, power * turn) for x, power in wanted])
        if pair is None or (turn == -1 and tree.items[0] in pair and tree.items[0].power == 1):
            continue
        pair[0].child, pair[0].power = result, turn
        tree.items.remove(pair[1])
        return True
    return False


def _pair(tree: _Tree, wanted: Sequence[tuple[Fraction, int]]) -> list[_Item] | None:
    """The items that stand for these numbers; in a sum -(-3) and +3 are the same."""

    def key(x: Fraction, power: int) -> tuple[Fraction, int]:
        return (x * power, 1) if tree.kind == "+" else (x, power)

    pair: list[_Item] = []
    for x, power in wanted:
        for item in tree.items:
            if not isinstance(item.child, _Tree) and item not in pair and key(item.child, item.power) == key(x, power):
                pair.append(item)
                break
    return pair if len(pair) == len(wanted) else None


def _collapse(tree: _Tree) -> None:
    """A sum or product of one thing is that thing; one of nothing is gone."""
    kept: list[_Item] = []
    for item in tree.items:
        if isinstance(item.child, _Tree):
            _collapse(item.child)
            inner = item.child
            if not inner.items:
                continue
            if len(inner.items) == 1 and (inner.kind == "+" or inner.items[0].power == 1):
                item = _single(inner, item.power)
        kept.append(item)
    tree.items[:] = kept


def _single(inner: _Tree, power: int) -> _Item:
    only = inner.items[0]
    if inner.kind == "+" and not isinstance(only.child, _Tree):
        return _Item(only.child * only.power, power)
    return _Item(only.child, power)
