"""`apportion show`: the sum adds up, colours mean what the legend says, and model text cannot steer the terminal."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apportion import Rollouts, Signal
from apportion.cli import _heat
from apportion.cli._heat import visible, written_sum


def numbers(text):
    """The printed total and the printed parts, in thousandths."""
    total, _, parts = text.partition(" = ")
    ticks = [round(float(x) * 1000) for x in re.findall(r"(?:^|(?<= ))[+-]\d+\.\d{3}", parts)]
    return round(float(total) * 1000), ticks


def test_a_sum_as_it_is_written():
    parts = {"outcome": 1.46, "judge": -0.0, "baseline": -0.68}
    assert written_sum(0.78, parts, digits=2) == "+0.78 = +1.46 outcome +0.00 judge -0.68 baseline"


def test_printed_numbers_add_up_although_each_is_rounded():
    """1/3 + 1/3 = 2/3: rounded one by one 0.333 + 0.333 is not 0.667."""
    assert written_sum(2 / 3, {"a": 1 / 3, "b": 1 / 3}) in (
        "+0.667 = +0.334 a +0.333 b",
        "+0.667 = +0.333 a +0.334 b",
    )


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(-5, 5), min_size=1))
def test_every_printed_sum_adds_up(parts):
    total, ticks = numbers(written_sum(sum(parts.values()), parts))
    assert len(ticks) == len(parts)
    assert sum(ticks) == total


def test_numbers_that_are_not_finite_are_shown_as_they_are():
    assert written_sum(float("nan"), {"a": float("inf"), "b": 1.0}) == "nan = +inf a +1.0 b"
    assert _heat.colour(float("nan"), 1.0).reverse


def test_what_the_parts_do_not_explain_is_said():
    assert written_sum(1.0, {"a": 0.25}) == "+1.000 = +0.250 a +0.750 unexplained"
    assert written_sum(1.0, {}) == "+1.000"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_run_shows_its_most_instructive_rollout(apportion, run_folder):
    """Rows 1 and 2 have a step the judge calls wrong, so their credit is spread; the first of them is shown."""
    told = apportion("show", run_folder)
    assert told.code == 0
    assert told.out.startswith("capo, step 1, row 1, prompt p1, answer 11, outcome 0\n")
    assert "wrong 3 of 3" in told.out
    assert "ok 3 of 3" in told.out
    for line in told.out.splitlines():
        if " = " in line and re.match(r"\d+ +\d+-\d+", line):
            total, ticks = numbers(re.search(r"[+-]\d\.\d{3} = .* baseline", line)[0])
            assert total == sum(ticks)


def test_the_sum_of_every_token_is_its_credit(apportion, run_folder):
    answer = json.loads(apportion("show", run_folder, "--json").out)
    assert len(answer["tokens"]) == 7
    for token in answer["tokens"]:
        assert sum(token["parts"].values()) == pytest.approx(token["advantage"], abs=1e-5)
    assert [step["judge"] for step in answer["steps"]] == [[0.0] * 3, [1.0] * 3]
    assert answer["tokens"][0]["advantage"] > answer["tokens"][-1]["advantage"]
    assert (answer["credit"], answer["step"], answer["row"], answer["prompt_id"]) == ("capo", 1, 1, "p1")


def test_choosing_a_rollout(apportion, run_folder):
    assert apportion("show", run_folder, "--step", 0, "--row", 3).out.startswith("capo, step 0, row 3, prompt p0")
    assert apportion("show", run_folder, "--prompt", "p1").out.startswith("capo, step 1, row 1, prompt p1")
    assert apportion("show", run_folder, "--credit", "grpo").out.startswith("grpo, step 1, row 0")


def test_one_line_per_token(apportion, run_folder):
    told = apportion("show", run_folder, "--tokens")
    assert len(re.findall(r"^\d +\d+ +[+-]\d\.\d{3} = ", told.out, re.MULTILINE)) == 7


def test_a_log_of_rollouts(apportion, log_file):
    told = apportion("show", log_file, "--credit", "rloo", "--row", 1)
    assert told.code == 0
    # the others' mean is 2/3 and this outcome 0: -2/3 on each token
    assert "-0.667" in told.out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["{run}", "--row", "4"], "--row 4: there are rows 0 to 3."),
        (["{run}", "--prompt", "p7"], "--prompt p7: not in this step. There is: p1."),
        (["{run}", "--step", "5"], "has no rollouts of step 5; recorded are 0 to 1"),
        (["{empty}", "--credit", "grpo"], "there are no tokens to show: every rollout is empty."),
        (["{log}"], "a file of rollouts needs --credit METHOD and has no --step."),
    ],
)
def test_mistakes(apportion, run_folder, log_file, tmp_path, argv, line):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"tokens": [], "group": 0, "outcome": 1}\n')
    told = apportion("show", *(x.format(log=log_file, run=run_folder, empty=empty) for x in argv))
    assert told.code == 2
    assert line in told.err
    assert told.err.count("\n") == 1


def test_a_run_without_any_credit_shows_its_last_step(apportion, tmp_path):
    from apportion.credit import grpo
    from apportion.record import RunWriter

    writer = RunWriter.create(tmp_path / "r", {"credit": repr(grpo())})
    for step in (0, 1):
        batch = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1.0, 1.0])
        writer.append(step, batch, grpo()(batch))
    told = apportion("show", tmp_path / "r")
    assert told.out.startswith("grpo, step 1, row 0, outcome 1\nno credit: every advantage is 0\n")


# ---- hostile text ---------------------------------------------------------------------------------------------------


def test_model_text_cannot_steer_the_terminal(apportion, run_folder, monkeypatch):
    """The answer holds an escape sequence and markup: both are spelt out, with and without colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")  # rich keeps styles as it first drew them in a process
    for argv in ([], ["--tokens"]):
        told = apportion("show", run_folder, "--row", 1, *argv)
        assert "\x1b[31m" not in told.out
        assert r"\x1b[31m[bold]14" in re.sub(r"\x1b\[[\d;]*m", "", told.out)


@given(st.text())
def test_only_printable_characters_are_left(text):
    shown = visible(text)
    assert shown.isprintable() or all(c.isprintable() or c.isspace() for c in shown)
    assert not set(shown) & {"\x1b", "\n", "\r", "\x07", "\x08", "\x9b", "\u202e", "\u2066", "\u200b", "\u2028"}


def test_hostile_prompt_ids_and_pieces_of_the_wrong_type(apportion, tmp_path):
    entry = {"tokens": [1, 2], "group": 0, "outcome": 1, "prompt_id": "\x1b]0;owned\x07", "pieces": ["[red]", "\x1bc"]}
    path = tmp_path / "hostile.jsonl"
    path.write_text("".join(json.dumps({**entry, "outcome": x}) + "\n" for x in (0, 1)))
    told = apportion("show", path, "--credit", "grpo")
    assert told.code == 0
    assert "\x1b" not in told.out
    assert "[red]" in told.out


# ---- colours --------------------------------------------------------------------------------------------------------


def test_zero_is_neutral_and_the_two_signs_differ():
    def background(x):
        colour = _heat.colour(x, 1.0).bgcolor
        return None if colour is None else colour.triplet

    assert background(0.0) is None
    up, down = background(1.0), background(-1.0)
    assert up.blue > up.red
    assert down.red > down.blue
    assert background(0.5).blue > background(0.5).red
    assert _heat.colour(1.0, 0.0).bgcolor is None


def test_colours_only_where_they_are_wanted(apportion, run_folder, monkeypatch):
    assert "\x1b[" not in apportion("show", run_folder).out  # not a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    coloured = apportion("show", run_folder).out
    assert "48;2;217;95;2m" in coloured  # the most blamed token has the end of the orange scale
    monkeypatch.setenv("NO_COLOR", "1")
    plain = apportion("show", run_folder).out
    assert "48;2" not in plain
    assert "wrong 3 of 3" in plain


def test_many_different_tokens_are_summed_up_by_step(apportion, tmp_path):
    """A critic gives every token its own credit: the table shows the mean of each step, and says so."""
    n = 60
    batch = Rollouts.from_lists(
        [list(range(n))],
        [0],
        outcome=[1.0],
        steps=[[(0, 30), (30, n)]],
        values=[torch.linspace(0, 1, n).tolist()],
        signals={"entropy": Signal(torch.zeros(1, n), "token")},
    )
    from apportion.record import write_jsonl

    write_jsonl(tmp_path / "log.jsonl", batch)
    told = apportion("show", tmp_path / "log.jsonl", "--credit", "gae(lam=0.9)")
    assert told.code == 0
    assert len(re.findall(r"^\d +\d+-\d+ +~ ", told.out, re.MULTILINE)) == 2
    assert "~ the mean over the tokens of that line" in told.out
