"""The page of results, in Markdown: nothing on it was written by hand, all of it is read off the cells."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from apportion.arena._learning import difference, summary
from apportion.arena._measures import MEASURES, Estimate
from apportion.arena._methods import BARS
from apportion.arena._results import (
    BASE,
    BETTER,
    Result,
    Results,
    estimate,
    holds,
    joined,
    label,
    methods,
    minus,
    over_base,
    ranked,
    tied,
)

COLUMNS = ("cosine", "bias", "noise", "rank", "sign", "auc", "blame", "aim", "snr")
"""Measures of the tables, the one that rows are sorted by first."""

KNOBS = {
    "size": "rollouts in a group",
    "verdict_error": "share of verdicts about steps that are wrong",
    "length": "length of a rollout",
    "terms": "numbers in a sum",
}
"""Knobs that get a table of their own."""


def report(results: Results, figures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        results: what to report; kinds that were not run have no section.
        figures: titles by the path of the picture, as the page links it.
    """
    parts = [
        _head(results),
        _bars(results),
        *(f"![{title}]({path})" for path, title in figures.items()),
        *(_world(results, name) for name in results.worlds),
        *(_sensitivity(results, knob, words) for knob, words in KNOBS.items()),
        *(_learning(results, name) for name in results.learned),
        _claims(results),
        _famous(results),
        _advice(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- what was run -----------------------------------------------------------------------------------------------------


def _head(results: Results) -> str:
    rows = [
        (name, f"`{base['world']}`", _cells_of(results, name), str(base["groups"]), str(base["size"]), _truth(base))
        for name in results.worlds
        if (base := results.cell(name))
    ]
    header = ("world", "as it is", "cells", "groups", "rollouts each", "what was sampled")
    words = "\n".join(f"- **{name}**: {MEASURES[name]}" for name in COLUMNS)
    return f"""# The arena: how right is the credit of every method?

Written by `apportion arena report` from files of results, one for each cell; no number or sentence about results was
typed by hand. [The arena](../arena.md) says how to run it and how to add a method. {_made_with(results)}

{_table(header, rows)}

What is measured, always against the exact advantage of every token:

{words}

Square brackets hold 95 % intervals: over groups, resampled, for measures; over seeds for learning. Methods whose printed
numbers are all the same share a line. `clip`, `whiten` and other transforms stand for GRPO followed by them."""


def _made_with(results: Results) -> str:
    def of(key: str) -> str:
        return ", ".join(sorted({str(c[key]) for c in results.cells if key in c}))

    days = sorted(str(c["finished"])[:10] for c in results.cells if "finished" in c)
    between = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "an unknown day"
    return (
        f"{len(results.cells)} cells, seeds {of('seed')}, apportion {of('apportion')}, torch {of('torch')}, Python {of('python')}, "
        f"on {of('machine')}, {between}."
    )


def _cells_of(results: Results, world: str) -> str:
    return str(sum(c["name"] == world for c in results.measured))


def _truth(cell: Result) -> str:
    t = cell["truth"]
    exact = f", known to within {t['standard_error']:.2g}" if t["standard_error"] else ""
    return f"outcome {t['outcome']:.2f}, {t['tokens']:.0f} tokens, {t['decisive']:.0%} of them decisive, root mean square of A {t['advantage']:.2f}{exact}"


# ---- the bars -----------------------------------------------------------------------------------------------------------

_CHANCE = {"bias": 1.0, "rank": 0.0, "sign": 0.5, "cosine": 0.0}


def _bars(results: Results) -> str:
    """Whether the exact advantage is the best, and random credit at chance, in every untouched world."""
    cells = [cell for name in results.worlds if (cell := results.cell(name))]
    count = 2 * len(_CHANCE) * len(cells)
    if not count:
        return ""
    rows = [row for cell in cells for m in _CHANCE for row in (_best(cell, m, count), _at_chance(cell, m, count))]
    lines = "\n".join(f"- [{'x' if held else ' '}] {words}" for held, words in rows)
    return f"""## Do the measures hold?

The exact advantage must be the best on bias, rank, sign and cosine, and random credit must be at chance. {count} checks are made,
so their intervals are widened until all of them together are right 95 % of the time.

{lines}

{sum(held for held, _ in rows)} of {count} hold."""


def _best(cell: Result, measure: str, count: int) -> tuple[bool, str]:
    bar, rival = BARS[0], ranked(cell, measure)[0]
    ahead = minus(estimate(cell, rival, measure), estimate(cell, bar, measure))
    wide = _widened(ahead, count)
    held = holds(wide, 0.0) or ahead.value * BETTER[measure] < 0
    numbers = f"{number(estimate(cell, bar, measure))}, next `{rival}` {number(estimate(cell, rival, measure))}"
    return held, f"{label(cell)}, {measure}: the exact advantage is the best: {numbers}"


def _at_chance(cell: Result, measure: str, count: int) -> tuple[bool, str]:
    wide = _widened(estimate(cell, BARS[1], measure), count)
    return holds(wide, _CHANCE[measure]), f"{label(cell)}, {measure}: random credit is at chance: {number(wide)}"


def _widened(e: Estimate, count: int) -> Estimate:
    """The interval for one of `count` checks (Bonferroni), as if it were normal."""
    normal = NormalDist()
    factor = normal.inv_cdf(1 - 0.025 / count) / normal.inv_cdf(0.975)
    return Estimate(e.value, e.value - factor * (e.value - e.low), e.value + factor * (e.high - e.value))


# ---- tables of measures ---------------------------------------------------------------------------------------------------


def _world(results: Results, name: str) -> str:
    cell = results.cell(name)
    assert cell is not None
    good = {m: _good(cell, m) for m in BETTER}
    order = [*(b for b in BARS if b in methods(cell, bars=True)), *ranked(cell, COLUMNS[0])]
    order += [n for n in methods(cell) if n not in order]
    rows = [
        (n, [*(_bold(number(estimate(cell, n, m)), n in good.get(m, ())) for m in COLUMNS), cost_of(cell, n)])
        for n in order
    ]
    return f"""## {name.capitalize()}

{cell["groups"]} groups of {cell["size"]} rollouts. Bold: the best method, and those that intervals do not tell apart from it, where that is
not more than a third of all. Cost: for each rollout, beyond the rollout itself.

{_table(("method", *COLUMNS, "cost"), joined(rows, _names))}

{_absent(cell)}"""


def _good(cell: Result, measure: str) -> list[str]:
    """The best and its equals; nobody, where they are more than a third."""
    order = ranked(cell, measure)
    good = [order[0], *tied(cell, measure, order[0])] if order else []
    return good if 3 * len(good) <= len(order) else []


def cost_of(cell: Result, method: str) -> str:
    """In words."""
    spent = cell["methods"][method]["cost"]
    names = {"tokens": ("token", "tokens"), "judge_calls": ("judge call", "judge calls"), "passes": ("pass", "passes")}
    return (
        ", ".join(f"{spent[k]:.3g} {one if spent[k] == 1 else more}" for k, (one, more) in names.items() if spent[k])
        or "-"
    )


def _absent(cell: Result) -> str:
    by_need: dict[str, list[str]] = {}
    for name, row in cell["methods"].items():
        if "absent" in row:
            by_need.setdefault(", ".join(row["absent"]), []).append(name)
    said = "; ".join(f"{_names(names)} ({needs})" for needs, names in by_need.items())
    return f"Not here, for want of what is in brackets: {said}." if said else "Every method runs here."


def _sensitivity(results: Results, knob: str, words: str) -> str:
    tables = [_along(results, name, knob) for name in results.worlds if len(results.along(name, knob)) > 1]
    if not tables:
        return ""
    about = f"The cosine of one group's policy gradient with the exact one. What does not change is left out, but for `{BASE}`."
    return f"## Sensitivity: {words}\n\n{about}\n\n" + "\n\n".join(tables)


def _along(results: Results, name: str, knob: str) -> str:
    by_value = results.along(name, knob)
    known = list(dict.fromkeys(n for cell in by_value.values() for n in methods(cell, bars=True)))
    rows = [(n, [number(_cosine(cell, n)) for cell in by_value.values()]) for n in known]
    rows = [(n, cells) for n, cells in rows if n == BASE or len(set(cells)) > 1]
    middle = list(by_value.values())[len(by_value) // 2]
    rows.sort(key=lambda row: -_cosine(middle, row[0]).value)
    return f"### {name.capitalize()}\n\n{_table(('method', *(f'{knob} {v}' for v in by_value)), joined(rows, _names))}"


def _cosine(cell: Result, method: str) -> Estimate:
    return (
        estimate(cell, method, "cosine")
        if method in methods(cell, bars=True)
        else Estimate(math.nan, math.nan, math.nan)
    )


# ---- learning and claims --------------------------------------------------------------------------------------------------


def _learning(results: Results, world: str) -> str:
    curves = results.curves(world)
    level, budget = results.level(world), next(iter(next(iter(curves.values())).values())).tokens[-1]
    found = {name: summary(by_seed, level=level) for name, by_seed in curves.items()}
    rows = []
    for name in sorted(found, key=lambda n: -found[n].area.value):
        s, price = found[name], next(iter(curves[name].values())).price
        gained = difference(curves[name], curves[BASE], level=level)["area"] if BASE in curves else None
        reached = f"{_tokens(s.tokens_to)}, {s.reached:.0%} of seeds"
        ends = (number(s.final), number(s.pass8), f"{s.collapsed:.0%}")
        rows.append((f"`{name}`", str(s.seeds), f"{price:.3g}", number(s.area), _signed(gained), reached, *ends))
    header = ("method", "seeds", "tokens paid per token", "area under the curve", f"area beyond {BASE}")
    return f"""## Learning: {world}

The same start, and {budget:,} tokens for every method, those of judges and further samples included. Area is the mean accuracy on the
way. The level was fixed before; a seed that never reached it counts with the whole budget. Collapse: the accuracy fell below a tenth of its best.

{_table((*header, f"tokens to accuracy {level:.2f}", "accuracy at the end", "pass@8 at the end", "collapsed"), rows)}"""


def _claims(results: Results) -> str:
    if not results.claims:
        return ""
    rows = [
        (f"`{c['method']}`", f"{c['says']} ({c['source']})", f"**{c['verdict']}**", _numbers(c), c["because"])
        for c in results.claims
    ]
    verdicts, short = [c["verdict"] for c in results.claims], sum(c["quick"] for c in results.claims)
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("shown", "not shown", "contradicted"))
    counts += f"; {short} of them in their short form" if short else ""
    table = _table(("method", "claim", "verdict", "numbers", "because"), rows)
    return f"## Claims of papers\n\nThe rule that turns numbers into a verdict stands in the code of each claim; some rules were settled after a first look at\nnumbers, which the [lab notes](../lab-notes.md) tell. {counts}.\n\n{table}"


def _numbers(claim: Result) -> str:
    """With three digits, whatever their unit."""
    told = {name: [f"{float(x):.3g}" if x is not None else "-" for x in v] for name, v in claim["numbers"].items()}
    return "; ".join(f"{name} {value} [{low}, {high}]" for name, (value, low, high) in told.items())


# ---- who is better than GRPO ----------------------------------------------------------------------------------------------


def _famous(results: Results) -> str:
    cells = {name: cell for name in results.worlds if (cell := results.cell(name)) and BASE in methods(cell)}
    gains = {n: _gains(cells, n) for n in sorted({n for cell in cells.values() for n in methods(cell)} - {BASE})}
    gains = {n: by_world for n, by_world in gains.items() if by_world}
    if not gains:
        return ""
    rows = [(n, [_judged(by_world.get(name)) for name in cells]) for n, by_world in gains.items()]
    always = [n for n, by_world in gains.items() if all(e.low > 0 for e in by_world.values())]
    never = [n for n, by_world in gains.items() if not any(e.low > 0 for e in by_world.values())]
    worse = [n for n in never if any(e.high < 0 for e in gains[n].values())]
    said = {
        "Better than GRPO in every world that can run them": always,
        "Better than GRPO in no world": [n for n in never if n not in worse],
        "Better in none, and worse in at least one": worse,
    }
    lines = [f"- {words}: {_counted(names, gains)}." for words, names in said.items() if names]
    return f"""## Against GRPO

By how much the cosine of one group's policy gradient with the exact one exceeds that of GRPO on the same episodes (the interval is of
the difference; one in twenty such intervals misses). Bold: better; struck through: worse; a difference that rounds to 0.00 is none.

{_table(("method", *cells), joined(rows, _names))}

{chr(10).join(lines)}"""


def _gains(cells: Mapping[str, Result], method: str) -> dict[str, Estimate]:
    found = {name: over_base(cell, method) for name, cell in cells.items() if method in methods(cell)}
    return {name: Estimate(*(round(x, 2) for x in vars(e).values())) for name, e in found.items() if e is not None}


def _judged(e: Estimate | None) -> str:
    if e is None:
        return "-"
    return f"~~{_signed(e)}~~" if e.high < 0 else _bold(_signed(e), e.low > 0)


def _counted(names: Sequence[str], gains: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Names, with in how many worlds they were measured."""
    return ", ".join(f"`{n}` ({len(gains[n])})" for n in names)


# ---- which method when ------------------------------------------------------------------------------------------------------

OUTCOME = frozenset(
    f"signals.{name}" for name in ("outcome", "entropy", "self_certainty", "sampled_logit", "sum_pi_squared")
) | {"tokens", "logprobs", "ref_logprobs"}
"""What every trainer has: the outcome, and what the policy's own pass gives."""
JUDGE = frozenset(("spans.step", "signals.judge", "signals.label"))
PRM = frozenset(("spans.step", "signals.process", "signals.margin"))
CRITIC = frozenset(("values",))
STATES = frozenset(("spans.turn", "spans.turn.state", "signals.turn_reward"))
BUDGETS = frozenset(("spans.budget", "spans.budget.parent", "signals.score"))
TREE = frozenset(("spans.branch", "spans.branch.parent"))
LEARNED = frozenset(("signals.log_ratio", "signals.decoded", "spans.step", "spans.turn"))


@dataclass(frozen=True)
class Situation:
    """A question that one cell answers: which method that reads nothing but what is `at_hand` is best there?"""

    words: str
    world: str
    turned: Mapping[str, Any] = field(default_factory=dict)
    at_hand: Collection[str] = OUTCOME
    measure: str = "cosine"


SITUATIONS = (
    Situation("only the outcome is known", "trees"),
    Situation("only the outcome is known, long written work", "arithmetic"),
    Situation("only the outcome is known, and the verifier errs in 20 %", "trees", {"verifier_error": 0.2}),
    Situation("only the outcome is known, groups of two", "trees", {"size": 2}),
    Situation("only the outcome is known, long filler between the tokens that decide", "trees", {"length": 96}),
    Situation("a judge of steps that errs in 10 %", "trees", {}, OUTCOME | JUDGE | PRM),
    Situation("a judge of steps that errs in 40 %", "trees", {"verdict_error": 0.4}, OUTCOME | JUDGE | PRM),
    Situation(
        "a judge of steps that errs in 40 %, written work", "arithmetic", {"verdict_error": 0.4}, OUTCOME | JUDGE | PRM
    ),
    Situation("the first wrong step must be found", "arithmetic", {}, OUTCOME | JUDGE | PRM, "auc"),
    Situation("a critic at hand", "trees", {}, OUTCOME | CRITIC),
    Situation("a poor critic at hand", "trees", {"critic_error": 0.4}, OUTCOME | CRITIC),
    Situation("states that recur, several turns", "rooms", {}, OUTCOME | STATES),
    Situation("states that recur, and a judge of turns", "rooms", {}, OUTCOME | STATES | JUDGE | PRM),
    Situation("thinking that is cut and answered at several lengths", "budgets", {}, OUTCOME | BUDGETS),
    Situation("rollouts that share their beginnings", "denoising", {}, OUTCOME | TREE),
    Situation("a reward model learned from the outcomes of earlier rollouts", "trees", {}, OUTCOME | LEARNED),
    Situation(
        "a reward model learned from the outcomes of earlier rollouts, several turns", "rooms", {}, OUTCOME | LEARNED
    ),
    Situation("a process reward model that is honest", "hackable", {"gaming": 0.0}, OUTCOME | PRM),
    Situation("a process reward model that can be gamed", "hackable", {}, OUTCOME | PRM),
)
"""In the order of the page. A situation whose cell was not run is left out."""


@dataclass(frozen=True)
class Answer:
    """What the evidence says about a situation."""

    words: str
    method: str
    evidence: str
    number: str
    over: Estimate | None
    others: list[str]

    @property
    def evidence_in_words(self) -> str:
        """The number, and what it is beyond GRPO's."""
        over = "" if self.over is None or self.method == BASE else f"; beyond {BASE} {_signed(self.over)}"
        return f"{self.number}{over}"

    def sentence(self) -> str:
        """All of it in words."""
        equal = f"not told apart from it: {_names(self.others)}" if self.others else "nothing else is as good"
        return f"- **{self.words[0].upper()}{self.words[1:]}**: `{self.method}` ({self.evidence_in_words}, in {self.evidence}); {equal}."


def _advice(results: Results) -> str:
    answers = [a for s in SITUATIONS if (a := _answer(results, s))]
    for world in results.learned:
        answers += _learned_answers(results, world)
    rows = [(a.words, f"`{a.method}`", a.evidence, a.evidence_in_words) for a in answers]
    return f"""## Which method when

In each situation the best method that reads nothing but what is there, by the measure named, and which others the intervals do not
tell apart from it: a longer list means less is known, not that all of them are good.

{chr(10).join(a.sentence() for a in answers)}

{_table(("situation", "method to use", "evidence", "interval"), rows)}"""


def _answer(results: Results, s: Situation) -> Answer | None:
    cell = results.cell(s.world, **s.turned)
    if cell is None:
        return None
    able = [n for n in methods(cell) if set(cell["methods"][n]["reads"]) <= set(s.at_hand)]
    order = ranked(cell, s.measure, able)
    if not order:
        return None
    best = order[0]
    told = f"{s.measure} {number(estimate(cell, best, s.measure))}"
    others = [n for n in tied(cell, s.measure, best) if n in able]
    return Answer(s.words, best, label(cell), told, over_base(cell, best) if s.measure == "cosine" else None, others)


def _learned_answers(results: Results, world: str) -> Iterable[Answer]:
    """Who learns fastest, and who explores best: the accuracy on the way, and pass@8 at the end."""
    curves = {n: c for n, c in results.curves(world).items() if n not in BARS}
    if not curves:
        return
    level = results.level(world)
    found = {n: summary(c, level=level) for n, c in curves.items()}
    asked = {
        "learning with few tokens": ("area", "area under the curve"),
        "many different answers wanted": ("pass8", "pass@8 at the end"),
    }
    for words, (name, told) in asked.items():
        figures: dict[str, Estimate] = {n: getattr(s, name) for n, s in found.items()}
        best = max(figures, key=lambda n: figures[n].value)
        equal = [n for n in figures if holds(difference(curves[best], curves[n], level=level)[name], 0.0)]
        best = BASE if BASE in equal else best  # what is not told apart from GRPO is no reason to leave it
        others = [n for n in equal if n != best]
        over = difference(curves[best], curves[BASE], level=level)[name] if BASE in curves else None
        yield Answer(f"{words}, {world}", best, f"learning/{world}", f"{told} {number(figures[best])}", over, others)


# ---- text -------------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def number(e: Estimate) -> str:
    """A value with its interval."""
    return "-" if math.isnan(e.value) else f"{_value(e.value)} {_interval(e)}"


def _signed(e: Estimate | None) -> str:
    if e is None or math.isnan(e.value):
        return "-"
    value, low, high = (f"{round(x, 2) + 0.0:+.2f}" for x in (e.value, e.low, e.high))
    return f"{value} [{low}, {high}]"


def _tokens(e: Estimate) -> str:
    return f"{e.value:,.0f} [{e.low:,.0f}, {e.high:,.0f}]"


def _interval(e: Estimate) -> str:
    return f"[{_value(e.low)}, {_value(e.high)}]"


def _value(x: float) -> str:
    return f"{round(x, 2) + 0.0:.2f}" if math.isnan(x) or abs(x) < 10 else f"{x:.3g}"
