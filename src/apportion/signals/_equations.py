"""Equations written in text, read and recomputed exactly. The text is hostile: nothing is evaluated but this grammar.

A side of an equation consists of numbers, `+ - * / ^` and parentheses, and of nothing else. Read as the same: `×`, `x`
between numbers, `·`, `÷`, the Unicode minus and dashes, `**`, LaTeX's `\\times`, `\\cdot` and `\\div`. Thousands
separators, decimals and per cent are understood, signs of currency are skipped. An equation of which a word is a part
(`2x = 10`, `3 apples + 2 = 5`) is not read, because nobody can say what it means by its numbers alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_TOKENS = 200
"""Longest equation that is read, in numbers and signs."""
MAX_DEPTH = 20
"""Deepest nesting of parentheses that is read."""
MAX_DIGITS = 30
"""Longest number that is read; also the bound on powers, whose result may have ten times as many digits."""


@dataclass(frozen=True)
class Number:
    """A number as written; `decimals` is how many digits stand behind its point (per cent: two more)."""

    value: Fraction
    decimals: int = 0


@dataclass(frozen=True)
class Operation:
    """`left op right`, op one of `+ - * / ^`."""

    op: str
    left: "Expression"
    right: "Expression"


Expression = Number | Operation


class Unreadable(ValueError):
    """Text that is not an expression of this grammar, or one that is too large."""


@dataclass(frozen=True)
class Equation:
    """Two or more expressions said to be equal; `about` where one of the signs was ≈."""

    sides: tuple[Expression, ...]
    about: bool = False

    @property
    def true(self) -> bool:
        """All sides are equal, exactly or as a rounded decimal; a division by zero is false."""
        try:
            values = [value(side) for side in self.sides]
        except ZeroDivisionError:
            return False
        pairs = zip(self.sides, values, self.sides[1:], values[1:], strict=False)
        return all(self._equal(a, x, b, y) for a, x, b, y in pairs)

    def _equal(self, a: Expression, x: Fraction, b: Expression, y: Fraction) -> bool:
        """Rounding to the nearest is allowed on a side that is one decimal number (after ≈ also a whole number)."""
        slack = Fraction(0)
        for side in (a, b):
            if isinstance(side, Number) and (side.decimals or self.about):
                slack = max(slack, Fraction(1, 2 * 10**side.decimals))
        return abs(x - y) <= slack

    @property
    def work(self) -> tuple[Operation, Number] | None:
        """The operation and its written result, where that is what the equation consists of."""
        if len(self.sides) != 2:
            return None
        for left, right in (self.sides, self.sides[::-1]):
            if isinstance(left, Operation) and isinstance(right, Number):
                return left, right
        return None


def value(e: Expression) -> Fraction:
    """The exact value.

    Raises:
        ZeroDivisionError: by a division by zero. Unreadable: a power that is too large.
    """
    if isinstance(e, Number):
        return e.value
    x, y = value(e.left), value(e.right)
    match e.op:
        case "+":
            return x + y
        case "-":
            return x - y
        case "*":
            return x * y
        case "/":
            return x / y
    return _power(x, y)


def _power(x: Fraction, y: Fraction) -> Fraction:
    size = max(x.numerator.bit_length(), x.denominator.bit_length()) * abs(y)
    if y.denominator != 1 or size > 10 * MAX_DIGITS * 4:
        raise Unreadable("a power that is fractional or too large")
    return Fraction(x ** int(y))


def operands(e: Expression) -> list[Fraction]:
    """The numbers written in it, left to right."""
    return [e.value] if isinstance(e, Number) else [*operands(e.left), *operands(e.right)]


# ---- reading ----------------------------------------------------------------------------------------------------------

_ALIKE = str.maketrans({"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "‑": "-"})
_LATEX = re.compile(r"\\(times|cdot|div|approx)(?![a-zA-Z])")
_LATEX_SIGN = {"times": "*", "cdot": "*", "div": "/", "approx": "≈"}
_MARK = re.compile(r"(=[^\S\n]*+[$€£]?+[^\S\n]*+)?+<<([^<>\n]{1,200})>>")
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?+%?+|\.\d++%?+)"
    r"|(?P<power>(?<=[\d)])\*\*(?=[-(\d.]))|(?P<times>(?<=[\d)%\s])[xX](?=\s?[(\d.$€£-]))"
    r"|(?P<markup>\*\*)|(?P<sign>[-+*/^()=≈])|(?P<skip>[$€£]|[^\S\n])|(?P<word>[^\W\d]\w*+)|(?P<other>.|\n)"
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    spaced: bool
    """White space, or the start of the text, stands before it."""


_END = _Token("other", "", True)


def equations(text: str) -> list[Equation]:
    """The equations in a text, in order. Calculator marks `<<48/2=24>>` are read too, once where they repeat."""
    return [found for run in _runs(_tokens(_unmarked(text))) if (found := _equation(run)) is not None]


def expression(text: str) -> Operation | None:
    """The arithmetic expression that a question asks for, if all of the question's numbers stand in it."""
    runs = [run for run in _runs(_tokens(text)) if any(t.kind == "number" for t in run)]
    if len(runs) != 1 or len(numbers(text)) != sum(t.kind == "number" for t in runs[0]):
        return None
    try:
        parsed = _Parser(runs[0]).whole()
    except Unreadable:
        return None
    return parsed if isinstance(parsed, Operation) else None


def arithmetic_value(text: str) -> Fraction:
    """The exact value of a text that is one arithmetic expression and nothing else, as a calculator reads it.

    Raises:
        ValueError: the text is no such expression, or its numbers are too large.
        ZeroDivisionError: by a division by zero.

    Example:
        >>> arithmetic_value("2*(3+4)"), arithmetic_value("1/3")
        (Fraction(14, 1), Fraction(1, 3))
    """
    tokens = _tokens(text.strip()) if len(text) <= MAX_TOKENS * MAX_DIGITS else []
    if not 0 < len(tokens) <= MAX_TOKENS or any(t.kind not in ("number", "sign") for t in tokens):
        raise Unreadable("not an arithmetic expression")
    return value(_Parser(tokens).whole())


def numbers(text: str) -> list[Fraction]:
    """The numbers written in a text, without their signs."""
    return [_number(t.text).value for t in _tokens(text) if t.kind == "number" and len(t.text) <= MAX_DIGITS]


def false_mark(text: str) -> bool:
    """A calculator mark in the text does not hold."""
    return any(not e.true for m in _MARK.finditer(text) for e in equations(m[2]))


def _unmarked(text: str) -> str:
    """A mark after "=" repeats the equation around it and is dropped; any other mark is the equation."""
    return _MARK.sub(lambda m: m[1] or f" ; {m[2]} ; ", text)


def _tokens(text: str) -> list[_Token]:
    text = _LATEX.sub(lambda m: _LATEX_SIGN[m[1]], text).translate(_ALIKE)
    out, spaced = [], True
    for m in _TOKEN.finditer(text):
        kind = str(m.lastgroup)
        if kind in ("skip", "markup"):
            spaced = spaced or m[0].isspace()
            continue
        sign = {"power": "^", "times": "*"}.get(kind)
        out.append(_Token("sign" if sign else kind, sign or m[0], spaced))
        spaced = m[0].isspace()
    return out


def _runs(tokens: Sequence[_Token]) -> list[list[_Token]]:
    """Unbroken stretches of numbers and signs, without those that a word cuts off at either end."""
    runs, i = [], 0
    while i < len(tokens):
        j = i
        while (
            j < len(tokens) and tokens[j].kind in ("number", "sign") and not (j > i and _apart(*tokens[j - 1 : j + 1]))
        ):
            j += 1
        if 0 < j - i <= MAX_TOKENS:
            run = _trimmed_left(tokens, i, j)
            run = run and _trimmed_right(run, tokens, j)
            if run:
                runs.append(run)
        i = max(j, i + 1)
    return runs


def _apart(a: _Token, b: _Token) -> bool:
    """No sign between two numbers: there ends one stretch and another begins."""
    after = a.kind == "number" or a.text == ")"
    return after and (b.kind == "number" or (b.text == "(" and b.spaced))


def _binary_at(tokens: Sequence[_Token], k: int) -> bool:
    """After a word, the sign at k joins it to a number: "apples + 3", "x-2", but not "is -2"."""
    pair = tokens[k : k + 2]
    if len(pair) < 2 or not (pair[1].kind == "number" or pair[1].text == "("):
        return False
    return pair[0].text in ("+", "*", "/", "^") or (pair[0].text == "-" and (pair[1].spaced or not pair[0].spaced))


def _trimmed_left(tokens: Sequence[_Token], i: int, j: int) -> list[_Token]:
    """Without a leading "=" (its right side stands by itself) or bullet; empty where a word cuts it off."""
    run = list(tokens[i:j])
    if run[0].text in ("=", "≈"):
        return run[1:]
    if i and tokens[i - 1].kind == "word" and _binary_at(tokens, i):
        return []
    bullet = len(run) > 1 and run[0].text in ("-", "*", "+") and run[1].spaced
    return run[1:] if bullet else run


def _trimmed_right(run: list[_Token], tokens: Sequence[_Token], j: int) -> list[_Token]:
    """Without a trailing "=", dash or unmatched parenthesis; empty where a word cuts it off."""
    after = tokens[j] if j < len(tokens) else _END
    while run and run[-1].kind == "sign":
        last = run[-1]
        unmatched = last.text == ")" and sum((t.text == "(") - (t.text == ")") for t in run) < 0
        dash = last.text in ("-", "(") and last.spaced and (after.spaced or last.text == "(")
        if not (last.text in ("=", "≈") or unmatched or dash):
            break
        run = run[:-1]
        if last.text in ("=", "≈"):
            return run
    if after.kind != "word":
        return run
    k = j
    while k < len(tokens) and tokens[k].kind == "word":
        k += 1
    return [] if not after.spaced or _binary_at(tokens, k) else run


def _equation(run: Sequence[_Token]) -> Equation | None:
    """The equation a stretch of tokens writes, or None where it writes none or one that is too large."""
    sides: list[list[_Token]] = [[]]
    for t in run:
        if t.text in ("=", "≈"):
            sides.append([])
        else:
            sides[-1].append(t)
    if len(sides) < 2:
        return None
    try:
        made = Equation(tuple(_Parser(side).whole() for side in sides), any(t.text == "≈" for t in run))
        made.true  # noqa: B018 - a power may be too large, which shows only here
    except Unreadable:
        return None
    return made


def _number(text: str) -> Number:
    if len(text) > MAX_DIGITS:
        raise Unreadable("a number that is too long")
    plain = text.replace(",", "").removesuffix("%")
    decimals = len(plain.partition(".")[2])
    percent = text.endswith("%")
    return Number(Fraction(plain) / (100 if percent else 1), decimals + 2 * percent)


class _Parser:
    """Recursive descent over the tokens of one side; sums over products over signs over powers."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def whole(self) -> Expression:
        parsed = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable("something after the end")
        return parsed

    def sum(self) -> Expression:
        left = self.product()
        while (op := self.peek()) in ("+", "-"):
            self.at += 1
            left = Operation(op, left, self.product())
        return left

    def product(self) -> Expression:
        left = self.signed()
        while (op := self.peek()) in ("*", "/", "("):  # a parenthesis right after a number or another one multiplies
            self.at += op != "("
            left = Operation("*" if op == "(" else op, left, self.signed())
        return left

    def signed(self) -> Expression:
        if self.peek() != "-":
            return self.power()
        self.at += 1
        inner = self.signed()
        return (
            Number(-inner.value, inner.decimals)
            if isinstance(inner, Number)
            else Operation("-", Number(Fraction(0)), inner)
        )

    def power(self) -> Expression:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.at += 1
        return Operation("^", base, self.signed())

    def atom(self) -> Expression:
        if self.at >= len(self.tokens):
            raise Unreadable("an operand is missing")
        token = self.tokens[self.at]
        self.at += 1
        if token.kind == "number":
            return _number(token.text)
        if token.text != "(" or self.depth >= MAX_DEPTH:
            raise Unreadable("an operand is missing, or too many parentheses")
        self.depth += 1
        inner = self.sum()
        self.depth -= 1
        if self.peek() != ")":
            raise Unreadable("a parenthesis is missing")
        self.at += 1
        return inner

    def peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""
