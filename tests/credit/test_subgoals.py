import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, calm, chain, whiten
from reference.batches import random_batch
from reference.loops import blank, discounted, episodes, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
SAID = [[0, 0], [1, 0], [0, 0], [1, 1], [0, 0]]
PAID = [0, 0, 0, 0, 1]
tried = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def room(said=SAID, paid=PAID, dtype=torch.float64, rows=1, truncated=False) -> Rollouts:
    """One episode, a token per turn; in one row, or with its last two turns in a row that stands first in the batch."""
    n = len(paid)
    cut = [(0, n)] if rows == 1 else [(n - 2, n), (0, n - 2)]
    of = [(row, k - a) for k in range(n) for row, (a, b) in enumerate(cut) if a <= k < b]
    row, start = torch.tensor(of).reshape(-1, 2).unbind(1)
    r = Rollouts.from_lists(
        [[1] * (b - a) for a, b in cut],
        [0] * len(cut),
        trajectories=[0] * len(cut),
        row_index=[0] if rows == 1 else [1, 0],
        truncated=[truncated] * len(cut),
        dtype=dtype,
    )
    return r.with_spans(turn=Spans(row, start, start + 1, start)).with_signals(
        turn_reward=Signal(torch.tensor(paid, dtype=dtype), "turn"),
        subgoal=Signal(torch.tensor(said, dtype=dtype).reshape(n, -1), "turn", ("subgoals",)),
    )


def in_time(table: torch.Tensor) -> torch.Tensor:
    return table[0] if len(table) == 1 else torch.cat([table[1, :3], table[0, :2]])


WORKED = {"once": [1.4706, 1.634, 1.26, 1.4, 1.0], "every": [1.8351, 2.039, 1.71, 1.9, 1.0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", WORKED)
@pytest.mark.parametrize("rows", [1, 2])
def test_worked_room(mode, dtype, rows):
    """The first subgoal is reported at turns 1 and 3, the second at 3; .5 each, discounted by .9."""
    credit = calm(room(dtype=dtype, rows=rows), lam=0.5, gamma=0.9, mode=mode)
    torch.testing.assert_close(in_time(credit.advantages), torch.tensor(WORKED[mode], dtype=dtype), **DTYPES[dtype])
    assert credit.notes["repeated"] == 1
    assert credit.notes["achieved"] == pytest.approx(0.3)


def test_shaped_rewards_of_the_worked_room():
    """gamma = 0 leaves each turn its own."""
    rewards = {m: calm(room(), lam=0.5, gamma=0.0, mode=m).advantages[0].tolist() for m in WORKED}
    assert rewards == {"once": [0.0, 0.5, 0.0, 0.5, 1.0], "every": [0.0, 0.5, 0.0, 1.0, 1.0]}


# ---- against the equation ---------------------------------------------------------------------------------------------------


def slow(r: Rollouts, mode: str, lam: float, gamma: float) -> torch.Tensor:
    table = blank(r)
    said = r.signals["subgoal"].values.tolist()
    for e in episodes(r, "turn"):
        paid = [float(r.signals["turn_reward"].values[s.number]) for s in e.steps]
        if all(math.isnan(x) for x in paid):
            continue
        rewards = [0.0 if math.isnan(x) else x for x in paid]
        achieved: set[int] = set()
        for k, s in enumerate(e.steps):
            now = {j for j, z in enumerate(said[s.number]) if z == 1}
            before, after = len(achieved), len(achieved | now)
            if mode == "every":
                rewards[k] += lam * len(now)
            elif mode == "once":
                rewards[k] += lam * (after - before)
            else:
                last = k == len(e.steps) - 1
                rewards[k] += lam * (gamma * (0 if last else after) - before)
            achieved |= now
        for s, g in zip(e.steps, discounted(rewards, gamma), strict=True):
            put(table, s.actions, [g] * len(s.actions))
    return table_of(table, r)


@given(seed=SEEDS, gamma=st.sampled_from([0.0, 0.9, 1.0]))
@tried
def test_agrees_with_the_loop(seed, gamma):
    r = random_batch(seed)
    for mode in ("once", "every", "potential"):
        got = calm(r, mode=mode, lam=0.3, gamma=gamma).advantages
        torch.testing.assert_close(got, slow(r, mode, 0.3, gamma), rtol=1e-9, atol=1e-9)


# ---- laws -----------------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS)
@tried
def test_no_bonus_and_bounded_bonus(seed):
    r = random_batch(seed)
    plain = slow(r, "once", 0.0, 0.9)
    for mode in ("once", "every", "potential"):
        torch.testing.assert_close(calm(r, mode=mode, lam=0.0, gamma=0.9).advantages, plain, rtol=1e-9, atol=1e-9)
    first = calm(r, lam=0.5, gamma=1.0).parts["subgoal"].values
    assert not len(first) or first.max() <= 0.5 * 2
    silent = r.with_signals(subgoal=Signal(r.signals["subgoal"].values[:, :0], "turn"))
    torch.testing.assert_close(calm(silent, gamma=0.9).advantages, plain, rtol=1e-9, atol=1e-9)


@given(seed=SEEDS, by=st.sampled_from([0.25, 50.0]))
@tried
def test_without_verdicts_credit_scales_with_the_rewards(seed, by):
    r = random_batch(seed)
    r = r.with_signals(subgoal=Signal(torch.zeros_like(r.signals["subgoal"].values), "turn"))
    more = r.with_signals(turn_reward=Signal(r.signals["turn_reward"].values * by, "turn"))
    torch.testing.assert_close(calm(more).advantages, by * calm(r).advantages, rtol=1e-9, atol=1e-9)


def test_potential_bonuses_leave_the_ranking_of_policies():
    """From the start every way to play gains the same constant, 0; paid once, a detour that collects subgoals wins."""
    straight = room([[0, 0], [0, 0], [0, 0]], [0, 0, 1])
    detour = room([[1, 0], [0, 1], [1, 1], [0, 0], [0, 0]], [0, 0, 0, 0, 1])
    for truncated in (False, True):
        for gamma in (1.0, 0.9):
            gain = [
                calm(room(p.signals["subgoal"].values.tolist(), p.signals["turn_reward"].values.tolist(),
                          truncated=truncated), mode="potential", lam=5.0, gamma=gamma).advantages[0, 0]
                for p in (straight, detour)
            ]  # fmt: skip
            torch.testing.assert_close(gain[0], torch.tensor(gamma**2, dtype=torch.float64))
            torch.testing.assert_close(gain[1], torch.tensor(gamma**4, dtype=torch.float64))
    assert calm(detour, lam=5.0).advantages[0, 0] > calm(straight, lam=5.0).advantages[0, 0]


def test_the_default_bonus():
    """0.1 over all subgoals."""
    assert calm(room(), gamma=0.0).advantages[0].tolist() == [0.0, 0.05, 0.0, 0.05, 1.0]


# ---- special cases ---------------------------------------------------------------------------------------------------------------


def test_a_subgoal_taken_twice_pays_once():
    """Pick up, drop, pick up."""
    credit = calm(room([[1], [0], [1]], [0, 0, 0]), lam=1.0)
    assert credit.advantages.tolist() == [[1.0, 0.0, 0.0]]
    assert calm(room([[1], [0], [1]], [0, 0, 0]), lam=1.0, mode="every").advantages.tolist() == [[2.0, 1.0, 1.0]]


def test_an_unusable_verdict_is_no_achievement():
    credit = calm(room([[NAN], [1], [NAN]], [0, 0, 0]), lam=1.0)
    assert credit.advantages.tolist() == [[1.0, 1.0, 0.0]]
    assert credit.notes["unusable_verdicts"] == 2


def test_unmeasured_rewards_and_what_lies_outside_turns():
    credit = calm(room([[1], [0]], [NAN, 2.0]), lam=1.0)
    assert credit.advantages.tolist() == [[3.0, 2.0]]
    assert credit.notes["unmeasured_turns"] == 1
    assert not calm(room([[1], [0]], [NAN, NAN])).mask.any()
    turns = Spans.from_lists([[(0, 1)]])
    r = Rollouts.from_lists([[1, 2]], [0], spans={"turn": turns}).with_signals(
        turn_reward=Signal(torch.ones(1), "turn"), subgoal=Signal(torch.zeros(1, 1), "turn")
    )
    assert calm(r).mask.tolist() == [[True, False]]


def test_a_baseline_follows():
    two = Rollouts.from_lists([[1], [2]], [0, 0], spans={"turn": Spans.from_lists([[(0, 1)], [(0, 1)]])})
    two = two.with_signals(
        turn_reward=Signal(torch.zeros(2), "turn"), subgoal=Signal(torch.tensor([[1.0], [0.0]]), "turn")
    )
    credit = chain(calm(), whiten(over="group", ddof=0, eps=0.0))(two)
    torch.testing.assert_close(credit.advantages, torch.tensor([[1.0], [-1.0]]))
    assert list(credit.parts) == ["turn_reward", "subgoal", "baseline"]


def test_messages():
    with pytest.raises(ValueError, match=r"calm needs verdicts 0, 1 or NaN in signals\['subgoal'\]; got 0\.5"):
        calm(room([[0.5]], [1.0]))
    flat = room().with_signals(subgoal=Signal(torch.zeros(5), "turn"))
    with pytest.raises(
        ValueError, match=r"shape \[S, subgoals\] over spans\['turn'\]; got unit 'turn' and shape \[5\]"
    ):
        calm(flat)
