"""`apportion arena`: running, tables, pictures, and the page that is written from results alone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from apportion.arena import Trees, _grid
from apportion.arena._cells import dumped, load
from apportion.arena._learning import Collapse, Curve
from apportion.arena._measures import Estimate
from apportion.arena._report import KNOBS, report
from apportion.arena._results import Results, estimate, joined, label, minus, over_base, ranked, setting, tied
from apportion.arena.claims import CLAIMS
from apportion.cli.arena import _cells, resolve

ROOT = Path(__file__).parents[2]
SMALL = Trees(prompts=2, length=4, decisions=2)
METHODS = ("exact_advantage", "random_credit", "grpo", "rloo", "gae", "capo", "gigpo")
STAMP = {
    "apportion": "0.1",
    "torch": "2.13",
    "python": "3.11",
    "machine": "one",
    "finished": "2026-11-25T10:00:00+00:00",
}


def measured(turned=(), size=4):
    world = replace(SMALL, **{k: v for k, v in turned if k != "size"})
    return _grid.Measured("trees", world, turned, METHODS, resolve, size=dict(turned).get("size", size), groups=24)


def learned(method, seed, end, **changes):
    accuracy = (0.2, (0.2 + end) / 2, end)
    curve = Curve((0, 500, 1000), accuracy, accuracy, (1.0,) * 3, (4.0,) * 3, **changes)
    return {
        "kind": "learning",
        "name": "trees",
        "method": method,
        "seed": seed,
        "level": 0.56,
        "curve": curve.to_json(),
    }


CLAIM = {
    "kind": "claims",
    "method": "capo",
    "source": "a paper",
    "says": "It finds the step.",
    "verdict": "shown",
    "numbers": {"more blame | there": [0.3, 0.2, 0.4]},
    "because": "the interval is above 0",
    "seed": 0,
    "quick": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small folder of results: measured by the real thing, trained and claimed by hand."""
    out = tmp_path_factory.mktemp("results")
    cells = [measured(), *(measured(((k, v),)) for k, v in (("size", 2), ("verdict_error", 0.4), ("length", 8)))]
    found = {cell.path: cell.compute(None, out) for cell in cells}
    for seed in (0, 1, 2):
        found[f"learning/trees/grpo/{seed}.json"] = learned("grpo", seed, 0.5 + 0.01 * seed)
        found[f"learning/trees/gae/{seed}.json"] = learned("gae", seed, 0.9 + 0.01 * seed)
        fallen = Collapse(1000, "accuracy fell") if seed == 0 else None
        found[f"learning/trees/random_credit/{seed}.json"] = learned("random_credit", seed, 0.0, collapsed=fallen)
    found["claims/capo_localises.json"] = CLAIM
    for path, result in found.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(dumped(result | STAMP))
    return out


@pytest.fixture(scope="module")
def results(folder):
    return Results(load(folder))


@pytest.fixture(scope="module")
def page(results):
    return report(results, {"arena/leaderboard.png": "A title"})


# ---- reading results ----------------------------------------------------------------------------------------------------


def test_cells_are_found_by_what_was_turned(results):
    assert results.worlds == ["trees"]
    assert label(results.cell("trees")) == "trees/base"
    assert label(results.cell("trees", verdict_error=0.4)) == "trees/verdict_error=0.4"
    assert results.cell("trees", verdict_error=0.3) is None
    assert {v: label(c) for v, c in results.along("trees", "size").items()} == {2: "trees/size=2", 4: "trees/base"}
    assert list(results.along("trees", "length")) == [4, 8]
    assert results.along("trees", "choices") == {}  # never turned
    assert results.along("trees", "rooms") == {}  # no such knob
    assert setting(results.cell("trees", length=8), "where") == "spread"


def test_the_best_and_what_cannot_be_told_apart_from_it(results):
    """Worked by hand: b has 0.1 more than GRPO with an interval of 0.05 to each side, c 0.02 with 0.01."""

    def row(cosine, over):
        return {"measures": {"cosine": cosine}, "over_grpo": over, "cost": {"tokens": 0.0}, "reads": []}

    rows = {
        "grpo": row([0.3, 0.1, 0.5], [0.0, 0.0, 0.0]),
        "b": row([0.4, 0.2, 0.6], [0.1, 0.05, 0.15]),
        "c": row([0.32, 0.1, 0.5], [0.08, 0.03, 0.13]),
        "random_credit": row([0.9, 0.9, 0.9], [0.6, 0.6, 0.6]),
    }
    cell = {"methods": rows | {"d": {"absent": ["values"]}}}
    assert ranked(cell, "cosine") == ["b", "c", "grpo"]
    assert tied(cell, "cosine", "b") == ["c"]  # 0.02 -+ 0.07; grpo: 0.1 -+ 0.05
    assert over_base(cell, "b") == Estimate(0.1, 0.05, 0.15)


def test_differences_of_independent_numbers_add_up_squares():
    found = minus(Estimate(1.0, 0.7, 1.4), Estimate(0.5, 0.2, 0.9))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - 0.5, 0.5 + 0.5))


def test_rows_that_print_the_same_are_one():
    assert joined([("a", ["1"]), ("b", ["2"]), ("c", ["1"])], "+".join) == [["a+c", "1"], ["b", "2"]]


# ---- the page -----------------------------------------------------------------------------------------------------------


def sections(page):
    return dict(re.findall(r"^## (.*?)\n\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_page_has_every_section(page):
    expected = [
        "Do the measures hold?",
        "Trees",
        *(f"Sensitivity: {w}" for knob, w in KNOBS.items() if knob != "terms"),
    ]
    assert [*sections(page)] == [*expected, "Learning: trees", "Claims of papers", "Against GRPO", "Which method when"]
    assert "![A title](arena/leaderboard.png)" in page
    assert "seeds 0, 1, 2, apportion 0.1, torch 2.13, Python 3.11, on one, 2026-11-25." in page


def test_it_ends_in_the_table_of_situations(page, results):
    table = rows_of(page.rstrip("\n").split("\n\n")[-1])
    assert table[0] == ["situation", "method to use", "evidence", "interval"]
    by_words = {row[0]: row for row in table[2:]}
    assert by_words["only the outcome is known, groups of two"][2] == "trees/size=2"
    critic = by_words["a critic at hand"]
    assert critic[1:3] == ["`gae`", "trees/base"]
    e = estimate(results.cell("trees"), "gae", "cosine")
    assert critic[3].startswith(f"cosine {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]; beyond grpo +")
    assert by_words["learning with few tokens, trees"][1:3] == ["`gae`", "learning/trees"]
    assert "a critic at hand, rooms" not in by_words  # what was not run has no row
    assert all(re.search(r"\[-?\d.*, .*\]", row[3]) for row in table[2:])


def test_a_situation_uses_only_what_is_at_hand(page):
    answer = next(row for row in rows_of(page) if row[0] == "only the outcome is known")
    assert answer[1] in ("`grpo`", "`rloo`")  # gae reads a critic, capo a judge


def test_every_method_is_in_the_table_of_its_world(page):
    text = sections(page)["Trees"]
    named = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows_of(text)))
    assert sorted(named) == sorted(set(METHODS) - {"gigpo"})
    assert "`gigpo` (spans.turn, signals.turn_reward, spans.turn.state)" in text
    assert len({len(row) for row in rows_of(text)}) == 1


def test_the_bars_are_checked_lines(page, results):
    lines = re.findall(r"^- \[(.)\] (.*)$", sections(page)["Do the measures hold?"], re.MULTILINE)
    assert len(lines) == 8
    assert {held for held, _ in lines} == {"x"}


def test_a_bar_that_does_not_hold_is_said(results):
    """Random credit that knows something, and a method that beats the truth."""
    cell = json.loads(json.dumps(results.cell("trees")))
    cell["methods"]["random_credit"]["measures"]["cosine"] = [0.5, 0.49, 0.51]
    cell["methods"]["grpo"]["measures"]["rank"] = [1.5, 1.49, 1.51]
    text = sections(report(Results([cell]), {}))["Do the measures hold?"]
    assert "- [ ] trees/base, cosine: random credit is at chance: 0.50" in text
    assert "- [ ] trees/base, rank: the exact advantage is the best" in text
    assert "6 of 8 hold." in text


def test_learning_is_told_with_collapse_and_the_difference_to_grpo(page):
    rows = {row[0]: row for row in rows_of(sections(page)["Learning: trees"])}
    assert rows["`gae`"][:3] == ["`gae`", "3", "1"]
    assert rows["`gae`"][4].startswith("+0.20 [")  # area: (0.2 + 0.9) / 2 against (0.2 + 0.5) / 2
    assert rows["`random_credit`"][-1] == "33%"
    assert rows["method"][5] == "tokens to accuracy 0.56"
    assert rows["`grpo`"][5] == "1,000 [1,000, 1,000], 0% of seeds"


def test_claims_are_told(page):
    text = sections(page)["Claims of papers"]
    assert "1 shown, 0 not shown, 0 contradicted; 1 of them in their short form." in text
    assert rows_of(text)[2] == [
        *("`capo`", "It finds the step. (a paper)", "**shown**", "more blame / there 0.3 [0.2, 0.4]"),
        "the interval is above 0",
    ]


def test_what_training_and_claims_write_is_what_the_page_reads(tmp_path):
    plan = _grid.Plan(tokens=400, rate=0.05, level=0.5, groups=2, size=4)
    cells = [_grid.Trained("trees", SMALL, m, resolve, s, plan) for m in ("grpo", "gigpo") for s in (0, 1)]
    cells.append(_grid.Claimed("tempo_is_grpo", quick=True))
    for cell in cells:
        (tmp_path / cell.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / cell.path).write_text(dumped(cell.compute(None, tmp_path)))
    found = sections(report(Results(load(tmp_path)), {}))
    assert list(found) == ["Learning: trees", "Claims of papers", "Which method when"]
    assert [row[0] for row in rows_of(found["Learning: trees"])[2:]] == ["`grpo`"]  # gigpo does not run in trees
    assert "400 tokens" in found["Learning: trees"]


def test_against_grpo_the_interval_decides(results):
    cell = json.loads(json.dumps(results.cell("trees")))
    for name, over in {"gae": [0.1, 0.05, 0.2], "capo": [0.1, -0.05, 0.2], "rloo": [-0.1, -0.2, -0.01]}.items():
        cell["methods"][name]["over_grpo"] = over
    text = sections(report(Results([cell]), {}))["Against GRPO"]
    assert "| `gae` | **+0.10 [+0.05, +0.20]** |" in text
    assert "| `rloo` | ~~-0.10 [-0.20, -0.01]~~ |" in text
    assert "- Better than GRPO in every world that can run them: `gae` (1)." in text
    assert "- Better than GRPO in no world: `capo` (1)." in text
    assert "- Better in none, and worse in at least one: `rloo` (1)." in text


def test_the_committed_page_is_what_the_committed_results_give():
    """If not: apportion arena report docs/results/arena"""
    kept, written = ROOT / "docs/results/arena", ROOT / "docs/results/arena.md"
    found = load(kept) if kept.exists() else []
    assert written.exists() == bool(found)
    if found:
        text = written.read_text()
        figures = {path: title for title, path in re.findall(r"^!\[(.*?)\]\((arena/.*?)\)$", text, re.MULTILINE)}
        assert figures
        assert report(Results(found), figures) == text


# ---- the command --------------------------------------------------------------------------------------------------------


def test_the_table_is_sorted_and_complete(apportion, folder):
    told = apportion("arena", "table", folder, "--measure", "bias", "noise", "--json")
    (cell,) = json.loads(told.out)
    names = [row["method"] for row in cell["methods"]]
    assert names[0] == "exact_advantage"
    assert set(names) == set(METHODS) - {"gigpo"}
    assert cell["absent"]["gigpo"] == ["spans.turn", "signals.turn_reward", "spans.turn.state"]
    assert set(cell["methods"][0]["bias"]) == {"value", "low", "high"}
    shown = apportion("arena", "table", folder, "--world", "trees/verdict_error=0.4").out
    assert "trees/verdict_error=0.4: 24 groups of 4 rollouts" in shown
    assert re.search(r"^capo .*\[.*\].* 3 judge calls\s*$", shown, re.MULTILINE)
    assert "not here, for want of a signal: gigpo" in shown


def test_plot_and_report_write_files(apportion, folder, tmp_path):
    told = apportion("arena", "report", folder, "--page", tmp_path / "docs" / "arena.md", "--json")
    assert told.code == 0, told.err
    wrote = json.loads(told.out)
    text = Path(wrote["page"]).read_text()
    assert [Path(p).name for p in wrote["figures"]] == [
        f"{n}.png" for n in ("leaderboard", "bias-noise", "sensitivity", "learning")
    ]
    for path in map(Path, wrote["figures"]):
        assert f"](arena/{path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".svg").read_text().endswith("</svg>\n")
    again = apportion("arena", "plot", folder, "--out", tmp_path / "again", "--json")
    for path in map(Path, json.loads(again.out)):
        assert (
            path.with_suffix(".svg").read_bytes()
            == (tmp_path / "docs" / "arena" / path.name).with_suffix(".svg").read_bytes()
        )


def test_run_computes_what_is_left_and_says_so(apportion, tmp_path, monkeypatch):
    monkeypatch.setattr(_grid, "worlds", lambda: {"trees": (SMALL, {})})
    command = (
        "arena",
        "run",
        "--worlds",
        "trees",
        "--methods",
        "grpo",
        "chain(grpo(), clip(limit=2.0))",
        "--out",
        tmp_path,
    )
    first = apportion(*command, "--workers", "1")
    assert first.code == 0, first.err
    assert f"{tmp_path}: 1 cells computed, 0 were there already." in first.out
    assert f"Next: apportion arena table {tmp_path}" in first.out
    assert first.err == "measures/trees/base.json\n"
    assert list(load(tmp_path)[0]["methods"]) == ["exact_advantage", "random_credit", *command[5:7]]
    assert json.loads(apportion(*command, "--json").out) == {"folder": str(tmp_path), "cells": 1, "computed": 0}


def test_kinds_and_choices_make_cells():
    def paths(*kinds, methods=(), worlds=()):
        return [cell.path for cell in _cells(kinds, methods, worlds)]

    assert set(paths("quick", worlds=["rooms"])) < set(paths("full", worlds=["rooms"]))
    assert paths("quick", "full", worlds=["rooms"]) == paths("full", worlds=["rooms"])
    assert paths("learning", methods=["grpo"], worlds=["trees", "rooms"]) == [
        f"learning/rooms/grpo/{s}.json" for s in range(5)
    ]
    assert paths("claims") == [f"claims/{claim.__name__}.json" for claim in CLAIMS]
    assert paths("quick", worlds=["apportion.arena:Trees"]) == ["measures/trees/base.json"]
    assert [c.quick for kinds in (["claims"], ["claims", "quick"]) for c in _cells(kinds, (), ["rooms"])[-1:]] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["tabel"], "arena has no subcommand 'tabel'. Did you mean 'table'?"),
        (["table", "/nowhere"], "there are no results in /nowhere. Run: apportion arena run --quick --out /nowhere"),
        (["table", "--measure", "biass"], "there is no measure 'biass'. Did you mean 'bias'?"),
        (["run", "--worlds", "treez"], "there is no world 'treez'. Did you mean 'trees'?"),
        (["run", "--methods", "grpoo"], "there is no credit method 'grpoo'. Did you mean 'grpo'?"),
        (["run", "--methods", "clip()"], "--methods clip() is a transform"),
        (["run", "--worlds", "nowhere:World"], "--worlds: there is no module 'nowhere' here or on PYTHONPATH."),
        (["run", "--worlds", "fractions:Fraction"], "--worlds fractions:Fraction is not a world: it has no method"),
        (["run", "--learning", "--worlds", "trees"], "nothing is learned in trees. There is: rooms, arithmetic"),
    ],
)
def test_a_mistake_is_one_line(apportion, argv, line):
    told = apportion("arena", *argv)
    assert told.code == 2
    assert told.err.startswith(f"apportion: {line}")
    assert told.err.count("\n") == 1


def test_a_world_that_was_not_measured_is_said(apportion, folder):
    told = apportion("arena", "table", folder, "--world", "trees/size=3")
    assert told.err.startswith("apportion: nothing was measured in 'trees/size=3'. Did you mean 'trees/size=2'?")


@pytest.mark.parametrize("name", ["run", "table", "plot", "report"])
def test_every_subcommand_has_help_with_examples(apportion, name):
    told = apportion("arena", name, "--help")
    assert told.code == 0
    assert f"apportion arena {name}" in told.out
    assert "Examples:" in told.out
