"""Rewards: hand-computed sums, and what happens when a function raises, hangs, or does not know."""

import asyncio
import dataclasses
import functools
import math
import time

import pytest
import torch

from apportion import gdpo
from apportion.record import Run
from apportion.signals import matches, of_signal, overlong, repetition
from apportion.tasks import BasicTask, Problem, unverified
from apportion.train import NotFinite, Reward, RewardFailed, openrlhf_reward, run, trl_reward, verl_reward
from apportion.train.rewards import check_rewards, rewarded, signal_names, unmeasured_counts
from apportion.types import Rollouts, Signal

TEXTS = ["7+5=12", "12", "", "7+5=12 so 12 12 12"]


def problems(*, chat=False, **data):
    prompt = [{"role": "user", "content": "7+5=?"}] if chat else "7+5=?"
    return [Problem(f"p{i}", "7+5=?", prompt, "12", data=data) for i in range(len(TEXTS))]


def rollouts(truncated=(False, False, False, False)):
    tokens = [[1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 5, 5, 5, 5]]
    mask = [[False] + [True] * (len(row) - 1) for row in tokens]
    return Rollouts.from_lists(tokens, [0, 0, 1, 1], action_mask=mask, truncated=truncated, meta={"text": TEXTS})


def length(problem, text):
    return float(len(text))


def equation(problem, text):
    return "=" in text


class Verifier:
    """The task's verifier: 1 where the answer occurs."""

    name, train, test = "t", (), ()

    def __init__(self):
        self.asked = []

    def verify(self, problem, text):
        self.asked.append(text)
        return float(problem.answer in text)


@pytest.fixture
def make(config):
    """`make(*rewards, **options)`: a configuration whose task has the verifier above."""

    def made(*rewards, **options):
        return config(rewards=rewards, task=Verifier(), **options)

    return made


def values(found, name):
    return found.signals[name].values.tolist()


# ---- sums ---------------------------------------------------------------------------------------------------------------


def test_the_outcome_is_the_weighted_sum_and_each_reward_a_signal(make):
    settings = make(Reward(length, -0.1), Reward(equation, 0.5, "format"), task_weight=2.0)
    found = rewarded(rollouts(), problems(), settings, may_miss=False)
    assert values(found, "verifier") == [1, 1, 0, 1]
    assert values(found, "length") == [6, 2, 0, 18]
    assert values(found, "format") == [1, 0, 0, 1]
    # 2 * 1 - 0.1 * 6 + 0.5 * 1;  2 - 0.2;  0;  2 - 1.8 + 0.5
    assert values(found, "outcome") == pytest.approx([1.9, 1.8, 0.0, 0.7])
    assert {s.unit for s in found.signals.values()} == {"trajectory"}
    assert signal_names(settings) == ["verifier", "length", "format"]


def test_without_rewards_the_outcome_is_the_verifiers(make):
    settings = make()
    found = rewarded(rollouts(), problems(), settings, may_miss=False)
    assert values(found, "outcome") == [1, 1, 0, 1]
    assert set(found.signals) == {"outcome"}
    assert signal_names(settings) == []


def test_a_task_without_weight_is_not_asked(make):
    settings = make(Reward(length), task_weight=0.0)
    found = rewarded(rollouts(), problems(), settings, may_miss=False)
    assert values(found, "outcome") == values(found, "length") == [6, 2, 0, 18]
    assert "verifier" not in found.signals
    assert settings.task.asked == []


def test_a_reward_without_weight_is_measured_only(make):
    found = rewarded(rollouts(), problems(), make(Reward(length, 0.0)), may_miss=False)
    assert values(found, "length") == [6, 2, 0, 18]
    assert values(found, "outcome") == [1, 1, 0, 1]


def test_none_adds_nothing_and_is_not_a_zero(make):
    def short_only(problem, text):
        return None if len(text) > 5 else 10.0

    found = rewarded(rollouts(), problems(), make(Reward(short_only)), may_miss=False)
    assert values(found, "outcome") == [1, 11, 10, 1]
    assert [math.isnan(x) for x in values(found, "short_only")] == [True, False, False, True]


def test_a_response_to_which_no_reward_applies_has_no_outcome(make):
    settings = make(Reward(lambda p, t: None if t == "" else 1.0, name="some"), task_weight=0.0)
    with pytest.raises(RewardFailed, match="the outcome has no reward that applies, on row 2, problem p2, text ''"):
        rewarded(rollouts(), problems(), settings, may_miss=False)
    found = rewarded(rollouts(), problems(), settings, may_miss=True)
    assert math.isnan(values(found, "outcome")[2])


def test_a_cut_response_gets_its_fixed_outcome_and_its_rewards_are_still_measured(make):
    settings = make(Reward(length), truncated_reward=-1.0)
    found = rewarded(rollouts([True, False, False, False]), problems(), settings, may_miss=False)
    assert values(found, "outcome") == [-1, 3, 0, 19]
    assert values(found, "length") == [6, 2, 0, 18]
    assert values(found, "verifier") == [1, 1, 0, 1]


def test_alone_the_verifier_is_not_asked_about_cut_responses(make):
    settings = make(truncated_reward=0.0)
    found = rewarded(rollouts([True, False, False, True]), problems(), settings, may_miss=False)
    assert values(found, "outcome") == [0, 1, 0, 0]
    assert settings.task.asked == ["12", ""]
    settings = make(truncated_reward=None)
    found = rewarded(rollouts([True, False, False, True]), problems(), settings, may_miss=False)
    assert values(found, "outcome") == [1, 1, 0, 1]


def test_a_cut_response_whose_outcome_is_fixed_may_lack_rewards(make, monkeypatch):
    """Nobody knows of row 0, which was cut: nothing stops, and nothing is left out."""
    settings = make(Reward(lambda p, t: math.nan if "=" in t else 1.0, name="short"), truncated_reward=-1.0)
    monkeypatch.setattr(settings.task, "verify", lambda p, t: math.nan if t == TEXTS[0] else 1.0)
    cut = rollouts([True, False, False, True])
    for may_miss in (False, True):
        found = rewarded(cut, problems(), settings, may_miss=may_miss)
        assert values(found, "outcome") == [-1, 2, 2, -1]
        assert torch.tensor(values(found, "short")).isnan().tolist() == [True, False, False, True]
        assert unmeasured_counts(found) == {}
    settings = make(*settings.rewards, truncated_reward=None, task_weight=0.0)
    with pytest.raises(RewardFailed, match=r"the reward short is nan, not measured, on row 0 \(and 1 more\)"):
        rewarded(cut, problems(), settings, may_miss=False)


# ---- what an environment paid ---------------------------------------------------------------------------------------------


def played(*paid, truncated=(False, False, False, False)):
    """The rollouts of a game that paid these; NaN = nothing."""
    return rollouts(truncated).with_signals(environment=Signal(torch.tensor(paid), "trajectory"))


@pytest.fixture
def game(make):
    """`game(*rewards, **options)`: a task without a verifier of its own."""

    def made(*rewards, **options):
        task = BasicTask("game", [], [], unverified, environment=lambda problem: None)
        return dataclasses.replace(make(*rewards, **options), task=task)

    return made


def test_the_verifier_has_the_last_word_whatever_an_environment_paid(make):
    """A tool that fines malformed calls must not take the place of the answer's reward."""
    found = rewarded(played(-0.1, math.nan, math.nan, -0.3), problems(), make(), may_miss=False)
    assert values(found, "outcome") == [1, 1, 0, 1]
    fined = make(Reward(of_signal("environment"), 2.0), unmeasured="skip")
    found = rewarded(played(-0.1, 0.0, 0.0, -0.3), problems(), fined, may_miss=False)
    assert values(found, "outcome") == pytest.approx([0.8, 1.0, 0.0, 0.4])


def test_without_a_verifier_the_outcome_is_what_the_environment_paid_even_for_blank_turns(game):
    found = rewarded(played(3.0, 0.5, -1.0, 0.0), problems(), game(), may_miss=False)
    assert values(found, "outcome") == [3, 0.5, -1, 0]
    found = rewarded(played(3.0, 0.5, -1.0, 0.0), problems(), game(Reward(length), task_weight=2.0), may_miss=False)
    assert values(found, "verifier") == [3, 0.5, -1, 0]
    assert values(found, "outcome") == [12, 3, -2, 18]
    alone = game(Reward(length), task_weight=0.0)
    assert values(rewarded(played(3.0, 0.5, -1.0, 0.0), problems(), alone, may_miss=False), "outcome") == [6, 2, 0, 18]


def test_a_game_that_paid_nothing_is_not_measured_unless_its_outcome_is_fixed(game):
    """Row 2 was cut in its first turn."""
    batch = played(3.0, 0.5, math.nan, 0.0, truncated=(False, False, True, False))
    for rewards in ((), (Reward(length, 0.0),)):
        fixed = game(*rewards, truncated_reward=-2.0)
        assert values(rewarded(batch, problems(), fixed, may_miss=False), "outcome") == [3, 0.5, -2, 0]
        open_ = game(*rewards, truncated_reward=None)
        with pytest.raises(
            RewardFailed, match=r"the reward verifier is nan, not measured, on row 2, problem p2, text ''"
        ):
            rewarded(batch, problems(), open_, may_miss=False)
        found = rewarded(batch, problems(), open_, may_miss=True)
        assert torch.tensor(values(found, "outcome")).isnan().tolist() == [False, False, True, False]
        assert unmeasured_counts(found) == {"unmeasured/verifier": 1}


def test_gdpo_reads_the_rewards_by_name(make):
    settings = make(Reward(equation, name="format"), Reward(length))
    found = rewarded(rollouts(), problems(), settings, may_miss=False)
    credit = gdpo(rewards=("verifier", "format"), weights=(1.0, 0.5))(found)
    # Two groups of two. verifier: 1, 1 | 0, 1 -> 0, 0 | -h, h, h = 0.5 / (sqrt(0.5) + 1e-4); format: h, -h | -h, h halved.
    h = 0.5 / (math.sqrt(0.5) + 1e-4)
    raw = torch.tensor([0.5 * h, -0.5 * h, -1.5 * h, 1.5 * h], dtype=torch.float64)
    expected = (raw - raw.mean()) / (raw.std() + 1e-4)
    first = found.action_mask.to(torch.int64).argmax(1)
    assert credit.advantages[torch.arange(4), first].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert gdpo(rewards=("verifier", "format", "length")).requires == (
        "signals.verifier",
        "signals.format",
        "signals.length",
    )


# ---- kinds of functions -----------------------------------------------------------------------------------------------------


class Batch:
    """All rewards at once."""

    name = "whole"

    def score(self, problems, texts):
        return torch.tensor([float(len(t)) for t in texts])


class AsyncBatch(Batch):
    async def score(self, problems, texts):
        await asyncio.sleep(0.01)
        return [len(t) for t in texts]


async def slow(problem, text):
    await asyncio.sleep(0.2)
    return len(text)


class SlowObject:
    async def __call__(self, problem, text):
        return await slow(problem, text)


@pytest.mark.parametrize(
    "function",
    [length, Batch(), AsyncBatch(), slow, SlowObject(), functools.partial(slow), lambda p, t: slow(p, t)],
    ids=["plain", "batch", "async batch", "async", "async object", "partial", "lambda"],
)
def test_every_kind_of_function_gives_the_same_rewards(make, function):
    found = rewarded(rollouts(), problems(), make(Reward(function, name="own")), may_miss=False)
    assert values(found, "own") == [6, 2, 0, 18]


def test_async_rewards_run_together_and_beside_plain_ones(make):
    def plain(problem, text):
        time.sleep(0.05)
        return 0.0

    settings = make(Reward(slow, name="a"), Reward(slow, name="b"), Reward(plain))
    start = time.perf_counter()
    rewarded(rollouts(), problems(), settings, may_miss=False)
    assert time.perf_counter() - start < 1.2  # one after another: 8 * 0.2 + 4 * 0.05 = 1.8 s


def test_async_rewards_share_a_loop_in_all_steps(make):
    loops = []

    async def remember(problem, text):
        loops.append(asyncio.get_running_loop())
        return 0.0

    for _ in range(2):
        rewarded(rollouts(), problems(), make(Reward(remember)), may_miss=False)
    assert len(set(loops)) == 1


def test_it_works_inside_a_running_event_loop_as_in_a_notebook(make):
    async def cell():
        return rewarded(rollouts(), problems(), make(Reward(slow)), may_miss=False)

    assert values(asyncio.run(cell()), "slow") == [6, 2, 0, 18]


MODULE = """
import os, re, signal, time
def size(problem, text):
    return len(text) + len(problem.answer)
def where(problem, text):
    return os.getpid()
def alarm(problem, text):
    signal.signal(signal.SIGALRM, lambda *_: None)   # the main thread of a process only
    return 1
def hostile(problem, text):
    return bool(re.match(r"(a+)+$", "a" * 40 + "b")) if text == "12" else 1.0
def broken(problem, text):
    return {}[text]
async def asked(problem, text):
    return 3.0
class Kept:
    @staticmethod
    def half(problem, text):
        return 0.5
def trl(prompts, completions, **columns):
    return [1.0] * len(prompts)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's."""
    name = f"own_rewards_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_by_name_runs_in_a_process(make, module):
    settings = make(
        Reward(f"{module}:size"), Reward(f"{module}:where"), Reward(f"{module}:alarm"), Reward(f"{module}:Kept.half")
    )
    found = rewarded(rollouts(), problems(year=2024), settings, may_miss=False)
    import os

    assert values(found, "size") == [8, 4, 2, 20]
    assert len(set(values(found, "where"))) == 1
    assert values(found, "where")[0] != os.getpid()
    assert values(found, "alarm") == [1] * 4
    assert values(found, "half") == [0.5] * 4


def test_an_async_function_by_name_runs_in_the_loop(make, module):
    found = rewarded(rollouts(), problems(), make(Reward(f"{module}:asked", 2.0)), may_miss=False)
    assert values(found, "asked") == [3] * 4
    assert values(found, "outcome") == [7, 7, 6, 7]


# ---- what fails names itself --------------------------------------------------------------------------------------------


def picky(problem, text):
    if text == "12":
        raise KeyError("no such thing")
    return 1.0


async def async_picky(problem, text):
    return picky(problem, text)


@pytest.mark.parametrize("function", [picky, async_picky])
def test_a_reward_that_raises_names_itself_the_rollout_and_its_own_line(make, function):
    with pytest.raises(RewardFailed) as e:
        rewarded(rollouts(), problems(), make(Reward(function, name="style")), may_miss=False)
    assert "the reward style raised KeyError: 'no such thing' (" in str(e.value)
    assert "test_rewards.py:" in str(e.value)
    assert str(e.value).endswith("on row 1, problem p1, text '12'")
    assert e.value.rows == [1]
    assert isinstance(e.value.__cause__, KeyError)
    assert isinstance(e.value, NotFinite)  # the loop saves its rollouts


def test_a_function_of_a_process_that_raises_brings_its_traceback(make, module):
    with pytest.raises(RewardFailed, match=rf"the reward broken raised KeyError: '7\+5=12' \(.*{module}.py:13\)") as e:
        rewarded(rollouts(), problems(), make(Reward(f"{module}:broken")), may_miss=False)
    assert "return {}[text]" in str(e.value.__cause__)


def test_a_verifier_that_raises_names_the_rollout(make, monkeypatch):
    settings = make()
    monkeypatch.setattr(settings.task, "verify", picky)
    with pytest.raises(RewardFailed, match=r"the reward verifier raised KeyError.* on row 1, problem p1"):
        rewarded(rollouts(), problems(), settings, may_miss=False)


def test_a_long_text_is_shown_by_its_ends(make):
    long = rollouts().replace(meta={"text": ["b" * 100 + "e" * 100] * 4})
    with pytest.raises(RewardFailed, match=r"text 'b{60} \.\.\. e{60}'$"):
        rewarded(long, problems(), make(Reward(lambda p, t: math.nan, name="n")), may_miss=False)


def hangs(problem, text):
    if text == "12":
        time.sleep(5)
    return 1.0


async def async_hangs(problem, text):
    if text == "12":
        await asyncio.sleep(60)
    return 1.0


async def refuses_to_end(problem, text):
    while text == "12":
        try:
            await asyncio.sleep(1)
        except BaseException:
            if asyncio.get_running_loop().time() > STOP[0]:
                raise
    return 1.0


STOP = [math.inf]


@pytest.mark.parametrize("function", [hangs, async_hangs, refuses_to_end])
def test_a_reward_that_hangs_names_itself_and_the_rollout(make, function):
    settings = make(Reward(function, name="slow"), reward_seconds=0.5)
    start = time.perf_counter()
    with pytest.raises(RewardFailed, match=r"the reward slow took longer than 0.5 s, on row 1, problem p1, text '12'"):
        rewarded(rollouts(), problems(), settings, may_miss=False)
    assert time.perf_counter() - start < 3
    found = rewarded(rollouts(), problems(), settings, may_miss=True)
    assert values(found, "slow")[2:] == [1, 1]  # the ones after it are still asked
    assert math.isnan(values(found, "outcome")[1])
    STOP[0] = 0.0


def test_a_process_that_hangs_is_killed_even_in_a_regular_expression(make, module):
    settings = make(Reward(f"{module}:hostile"), reward_seconds=0.5)
    with pytest.raises(RewardFailed, match=r"the reward hostile took longer than 0.5 s, on row 1"):
        rewarded(rollouts(), problems(), settings, may_miss=False)
    found = rewarded(rollouts(), problems(), settings, may_miss=True)
    assert unmeasured_counts(found) == {"unmeasured/hostile": 1}


def test_an_async_reward_that_blocks_the_loop_is_found(make):
    async def blocks(problem, text):
        time.sleep(2.0)
        return 1.0

    start = time.perf_counter()
    with pytest.raises(RewardFailed, match=r"the reward blocks got no answer, because it .* kept the event loop busy"):
        rewarded(rollouts(), problems(), make(Reward(blocks), reward_seconds=0.3), may_miss=False)
    assert time.perf_counter() - start < 1.9
    found = rewarded(rollouts(), problems(), make(Reward(slow)), may_miss=False)  # in a new loop
    assert values(found, "slow") == [6, 2, 0, 18]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("0.5", "gave '0.5', which is not a number"),
        ({"score": 1.0}, r"gave {'score': 1.0}, which is not a number"),
        (math.nan, "is nan, not measured"),
        (math.inf, "is inf"),
        (-1e39, r"is -1e\+39"),
    ],
)
def test_what_is_not_a_number_is_refused(make, answer, what):
    with pytest.raises(RewardFailed, match=f"the reward odd {what}, on row 0"):
        rewarded(rollouts(), problems(), make(Reward(lambda p, t: answer, name="odd")), may_miss=False)


def test_every_row_that_is_nan_is_named(make):
    with pytest.raises(RewardFailed) as e:
        rewarded(rollouts(), problems(), make(Reward(lambda p, t: math.nan, name="n")), may_miss=False)
    assert e.value.rows == [0, 1, 2, 3]
    assert "the reward n is nan, not measured, on row 0 (and 3 more), problem p0" in str(e.value)


@pytest.mark.parametrize(
    ("found", "what"),
    [([1.0, 2.0], "gave 2 numbers for 4 responses"), (0.5, "gave 0.5 instead of one number per response")],
)
def test_a_batch_of_another_size_is_refused(make, found, what):
    class Odd:
        def score(self, problems, texts):
            return found

    with pytest.raises(RewardFailed, match=f"the reward odd {what}.*, asked for all 4 responses at once, on row 0,"):
        rewarded(rollouts(), problems(), make(Reward(Odd(), name="odd")), may_miss=False)


def test_skipped_rewards_are_nan_counted_and_their_reasons_kept(make):
    settings = make(Reward(picky, 0.5), Reward(lambda p, t: math.nan if t == "" else 1.0, name="none"))
    found = rewarded(rollouts(), problems(), settings, may_miss=True)
    assert values(found, "outcome")[0] == 1 + 0.5 + 1
    assert [math.isnan(x) for x in values(found, "outcome")] == [False, True, True, False]
    assert values(found, "verifier") == [1, 1, 0, 1]
    assert unmeasured_counts(found) == {"unmeasured/none": 1, "unmeasured/picky": 1}
    assert found.meta["unmeasured"][1][0].startswith("picky: raised KeyError: 'no such thing'")
    assert found.meta["unmeasured"][2] == ["none: is nan, not measured"]


def test_an_infinite_reward_is_refused_even_if_rewards_may_be_missing(make):
    with pytest.raises(RewardFailed, match="the reward odd is -inf, on row 0"):
        rewarded(rollouts(), problems(), make(Reward(lambda p, t: -math.inf, name="odd")), may_miss=True)


# ---- rewards of other trainers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_of_trl(make, chat):
    seen = {}

    def style(prompts, completions, completion_ids, year, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids, year=year)
        return [1.0, None, 0.0, 2.0]

    found = rewarded(rollouts(), problems(chat=chat, year=2024), make(Reward(trl_reward(style))), may_miss=False)
    assert values(found, "outcome") == [2, 1, 0, 3]
    assert seen["prompts"][0] == ([{"role": "user", "content": "7+5=?"}] if chat else "7+5=?")
    assert seen["completions"][1] == ([{"role": "assistant", "content": "12"}] if chat else "12")
    assert seen["ids"] == [[2, 3], [2], [2, 3, 4], [5, 5, 5, 5]]
    assert (seen["year"], seen["answer"], seen["solution"]) == ([2024] * 4, ["12"] * 4, [None] * 4)


def test_an_async_reward_of_trl(make):
    async def style(completions, **columns):
        await asyncio.sleep(0.01)
        return [len(c) for c in completions]

    found = rewarded(rollouts(), problems(), make(Reward(trl_reward(style))), may_miss=False)
    assert values(found, "style") == [6, 2, 0, 18]


def test_a_reward_of_verl(make):
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        right = float(ground_truth in solution_str)
        return {"score": right, "acc": 0} if extra_info["index"] == 7 and data_source == "math" else -1.0

    async def later(data_source, solution_str, ground_truth, extra_info=None):
        return compute_score(data_source, solution_str, ground_truth, extra_info)

    settings = make(Reward(verl_reward(compute_score)), Reward(verl_reward(later)))
    found = rewarded(rollouts(), problems(data_source="math", index=7), settings, may_miss=False)
    assert values(found, "compute_score") == values(found, "later") == [1, 1, 0, 1]


def test_a_reward_of_openrlhf(make):
    def reward_func(queries, prompts, labels):
        assert labels == ["12"] * 4
        rewards = [float(q.startswith(p) and len(q) - len(p)) for q, p in zip(queries, prompts, strict=True)]
        return {"rewards": torch.tensor(rewards), "scores": torch.tensor(rewards), "extra_logs": {}}

    for chat in (False, True):
        found = rewarded(rollouts(), problems(chat=chat), make(Reward(openrlhf_reward(reward_func))), may_miss=False)
        assert values(found, "reward_func") == [6, 2, 0, 18]


# ---- length and form ----------------------------------------------------------------------------------------------------


def test_length_form_and_repetition_are_rewards(make):
    settings = make(
        Reward(overlong(limit=4, buffer=2)), Reward(repetition(n=2), 2.0), Reward(matches(r"\d=\d"), 0.1), task_weight=0
    )
    found = rewarded(rollouts(), problems(), settings, may_miss=False)
    assert values(found, "overlong") == [0, 0, -0.5, -1]  # 2, 1, 3, 4 tokens written
    assert values(found, "repetition") == pytest.approx([0, 0, 0, -2 / 3])  # 5 5 5 5: three pairs, all the same
    assert values(found, "matches") == [1, 0, 0, 1]
    assert values(found, "outcome") == pytest.approx([0.1, 0, -0.5, -1 - 4 / 3 + 0.1])


# ---- mistakes, said at the start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda p, t: 1.0,), r"a reward needs a name .*; '<lambda>' is none. Give one"),
        ((length, 1.0, "a.b"), r"'a.b' is none"),
        ((length, math.nan), r"the reward length needs a finite weight; got nan"),
        ((lambda text: 1.0, 1.0, "f"), r"a reward is called as f\(problem, text\), but f takes \(text\)"),
        (
            (lambda prompts, completions, **_: [], 1.0, "f"),
            r"written for another trainer. Wrap it: trl_reward\(f\); .* trl:",
        ),
        ((lambda data_source, solution_str: 0, 1.0, "f"), r"Wrap it: verl_reward\(f\)"),
        ((lambda queries, prompts, labels: 0, 1.0, "f"), r"Wrap it: openrlhf_reward\(f\)"),
    ],
)
def test_a_reward_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reward(*arguments)


def test_what_is_no_function_is_refused():
    with pytest.raises(
        TypeError, match=r"a reward is a function or an object with score\(problems, texts\); got a int"
    ):
        Reward(3, name="three")


def test_a_function_by_name_is_checked_too(module):
    with pytest.raises(ValueError, match=r"Wrap it: trl_reward\(trl\)"):
        Reward(f"{module}:trl")


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ((Reward(length), Reward(length)), {}, r"2 rewards are named 'length', but each needs a name of its own"),
        (
            (Reward(length, name="judge"),),
            {},
            r"a reward is named 'judge', but a signal of that name comes from elsewhere",
        ),
        ((Reward(length, name="entropy"),), {}, r"named 'entropy'"),
        (
            (Reward(overlong(9, 3)),),
            {"truncated_reward": 0.0},
            r"overlong\(limit=9, buffer=3\).* truncated_reward is 0,",
        ),
    ],
)
def test_rewards_that_do_not_fit_together_are_refused(make, rewards, options, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(make(*rewards, **options))


def test_the_check_starts_what_the_rewards_need(make, module):
    reward = Reward(f"{module}:where")
    check_rewards(make(reward))
    assert reward.function.worker._process.poll() is None
    reward.function.worker.close()


def test_a_reward_prints_the_same_in_every_process(module):
    assert repr(Reward(length, 0.5)) == f"Reward({__name__}:length, weight=0.5, name='length')"
    assert repr(Reward(f"{module}:size")) == f"Reward({module}:size, weight=1, name='size')"
    assert repr(Reward(trl_reward(length))) == f"Reward(trl_reward({__name__}:length), weight=1, name='length')"
    assert repr(Reward(overlong(9, 3))) == "Reward(overlong(limit=9, buffer=3), weight=1, name='overlong')"
    assert repr(Reward(Batch())) == f"Reward({__name__}:Batch, weight=1, name='whole')"


# ---- in the loop ----------------------------------------------------------------------------------------------------------


def digits_share(problem, text):
    return sum(c.isdigit() for c in text) / (len(text) or 1)


async def even(problem, text):
    return None if not text else float(len(text) % 2 == 0)


def test_a_run_adds_the_rewards_logs_each_and_gives_them_to_the_credit(config, digits):
    settings = config(
        task=digits,
        credit=gdpo(rewards=("verifier", "digits_share", "even"), weights=(1.0, 0.5, 0.25)),
        rewards=(Reward(digits_share, 0.5), Reward(even, 0.25), Reward(overlong(24, 12), 0.1)),
        eval_every=0,
    )
    folder = run(settings)
    made = Run(folder).rollouts(1)
    texts = made.meta["text"]
    share = [digits_share(None, t) for t in texts]
    assert values(made, "digits_share") == pytest.approx(share)
    parts = [digits.verify(None, t) + 0.5 * s + 0.25 * (len(t) % 2 == 0) for t, s in zip(texts, share, strict=True)]
    lengths = made.action_mask.sum(1).tolist()
    expected = [x - 0.1 * min(1.0, max(0.0, (n - 12) / 12)) for x, n in zip(parts, lengths, strict=True)]
    assert values(made, "outcome") == pytest.approx(expected, abs=1e-6)
    logged = Run(folder).metrics("train")[0]
    assert logged["reward/digits_share"] == pytest.approx(sum(share) / len(share))
    assert logged["reward"] == pytest.approx(sum(expected) / len(expected))
    assert "digits_share" in Run(folder).credit(1).parts


def test_a_run_stops_at_a_reward_that_raises_and_saves_the_rollout(config, digits):
    def fragile(problem, text):
        raise KeyError("gone")

    settings = config(task=digits, rewards=(Reward(fragile),), eval_every=0)
    with pytest.raises(
        NotFinite, match=r"step 1 stopped: the reward fragile raised KeyError: 'gone' .*, caused by 1 of 16"
    ):
        run(settings)
    assert (settings.folder / "not-finite-step-000001.jsonl").exists()


def test_a_run_leaves_out_what_it_may_miss(config, digits):
    calls = iter(range(10**6))

    def moody(problem, text):
        if next(calls) % 4 == 0:
            raise OSError("no answer")
        return 1.0

    folder = run(config(task=digits, rewards=(Reward(moody),), unmeasured="skip", eval_every=0, steps=1))
    assert Run(folder).metrics("train")[0]["unmeasured"] == 4
    made, credit = Run(folder).rollouts(1), Run(folder).credit(1)
    assert unmeasured_counts(made) == {"unmeasured/moody": 4}
    assert not credit.mask[0].any()
    assert credit.mask[1].any()
