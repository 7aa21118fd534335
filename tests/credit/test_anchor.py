import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, gigpo, group_relative
from reference.batches import random_batch
from reference.loops import blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
PLAYED = [[("s0", 0), ("s1", 0), ("s2", 1)], [("s0", 0), ("s1", 0), ("s0", 0), ("s3", 0)], [("s0", 0), ("s2", 1)]]
tried = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def played(games=PLAYED, groups=None, dtype=torch.float64, width=1, rows="episode") -> Rollouts:
    """Turns of `width` tokens; a row is an episode, or a turn."""
    groups = groups or [0] * len(games)
    turns = [(i, k, *turn) for i, game in enumerate(games) for k, turn in enumerate(game)]
    names = sorted({s for _, _, s, _ in turns})
    state = torch.tensor([names.index(s) for _, _, s, _ in turns])
    reward = Signal(torch.tensor([x for *_, x in turns], dtype=dtype), "turn")
    where = torch.tensor([(i, k) for i, k, *_ in turns])
    if rows == "episode":
        row, start = where[:, 0], where[:, 1] * width
        r = Rollouts.from_lists([[1] * (width * len(g)) for g in games], groups, dtype=dtype)
    else:
        row, start = torch.arange(len(turns)), torch.zeros(len(turns), dtype=torch.int64)
        of = where[:, 0].tolist()
        r = Rollouts.from_lists([[1] * width for _ in turns], [groups[i] for i in of], trajectories=of, dtype=dtype)
    return r.with_spans(turn=Spans(row, start, start + width, where[:, 1], state)).with_signals(turn_reward=reward)


def lists(table: torch.Tensor, games=PLAYED) -> list[list[float]]:
    return [table[i, : len(g)].tolist() for i, g in enumerate(games)]


def flat(rows: list[list[float]], dtype) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=dtype)


# ---- worked by hand ---------------------------------------------------------------------------------------------------

STATE_STD = [[0.821073, 0.707106, 0.0], [-0.865455, -0.707106, -0.865455, 0.0], [0.909837, 0.0]]
WORKED = {
    ("std", "trajectory"): (
        [0.577349, -1.154699, 0.577349],
        [[1.398422, 1.284455, 0.577349], [-2.020154, -1.861804, -2.020154, -1.154699], [1.487187, 0.577349]],
    ),
    ("std", "turn"): (
        [0.843272, -1.054091, 0.843272],
        [[1.664345, 1.550378, 0.843272], [-1.919546, -1.761196, -1.919546, -1.054091], [1.753110, 0.843272]],
    ),
    (None, "trajectory"): (
        [0.333333, -0.666667, 0.333333],
        [[0.772708, 0.808333, 0.333333], [-1.129792, -1.141667, -1.129792, -0.666667], [0.820208, 0.333333]],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "by"), WORKED)
@pytest.mark.parametrize("rows", ["episode", "turn"])
def test_worked_games(scale, by, dtype, rows):
    """Three games of one task: the returns are .9025 .95 1, 0 0 0 0 and .95 1; s0 was visited four times, s3 once."""
    r = played(dtype=dtype, rows=rows)
    credit = gigpo(r, scale=scale, episodes=by)
    episode, total = WORKED[scale, by]
    got = credit.advantages[:, 0] if rows == "turn" else flat(lists(credit.advantages), dtype)
    torch.testing.assert_close(got, flat(total, dtype), **DTYPES[dtype])
    torch.testing.assert_close(credit.parts["turn_reward"].values, torch.tensor(episode, dtype=dtype), **DTYPES[dtype])
    if scale:
        torch.testing.assert_close(credit.parts["state"].values, flat(STATE_STD, dtype), **DTYPES[dtype])


def test_returns_of_the_worked_games():
    """Every state of its own and the mean taken off: what is left of each return against a return of 0 elsewhere."""
    games = [[("a", 0), ("b", 0), ("c", 1)], [("a", 0), ("b", 0), ("c", 0)]]
    state = gigpo(played(games), scale=None).parts["state"].values
    torch.testing.assert_close(state[:3] * 2, torch.tensor([0.9025, 0.95, 1.0], dtype=torch.float64))


def test_notes_say_how_often_states_recurred():
    """s0 four times, s1 and s2 twice, s3 once: 9 turns in 4 anchor groups."""
    notes = gigpo(played()).notes
    assert notes["anchor_group_size"] == 9 / 4
    assert notes["turns_alone"] == pytest.approx(1 / 9)


# ---- against the equation -----------------------------------------------------------------------------------------------


def slow(r: Rollouts, omega=1.0, gamma=0.95, scale="std", by="trajectory", eps=1e-6) -> torch.Tensor:
    every = episodes(r, "turn")
    state = r.spans["turn"].state.tolist()
    paid = [[float(r.signals["turn_reward"].values[s.number]) for s in e.steps] for e in every]
    totals = [NAN if all(math.isnan(x) for x in xs) else sum(x for x in xs if not math.isnan(x)) for xs in paid]

    def relative(x: float, pool: list[float]) -> float:
        if max(pool) - min(pool) < 1e-11:
            return 0.0
        return (x - mean(pool)) / (deviation(pool) + eps if scale else 1.0)

    members = []
    for i, (e, xs) in enumerate(zip(every, paid, strict=True)):
        after = 0.0
        for s, x in reversed(list(zip(e.steps, xs, strict=True))):
            after = (0.0 if math.isnan(x) else x) + gamma * after
            if not math.isnan(totals[i]):
                members.append((i, s, (e.group, state[s.number]), after))
    table = blank(r)
    for i, e in enumerate(every):
        if math.isnan(totals[i]):
            continue
        mates = [k for k, x in enumerate(every) if x.group == e.group and not math.isnan(totals[k])]
        pool = [totals[k] for k in mates for _ in (every[k].steps if by == "turn" else [0])]
        put(table, e.actions, [relative(totals[i], pool)] * len(e.actions))
    for _, s, anchor, gain in members:
        extra = omega * relative(gain, [g for _, _, a, g in members if a == anchor])
        for b, t in s.actions:
            table[b][t] += extra
    assert len({i for i, *_ in members}) == sum(not math.isnan(x) for x in totals)
    return table_of(table, r)


@given(seed=SEEDS, omega=st.sampled_from([0.0, 0.5, 1.0]), gamma=st.sampled_from([0.0, 0.95, 1.0]))
@tried
def test_agrees_with_the_loop(seed, omega, gamma):
    r = random_batch(seed)
    for scale in ("std", None):
        for by in ("trajectory", "turn"):
            got = gigpo(r, omega=omega, gamma=gamma, scale=scale, episodes=by).advantages
            torch.testing.assert_close(got, slow(r, omega, gamma, scale, by), rtol=1e-9, atol=1e-9)


# ---- laws -----------------------------------------------------------------------------------------------------------------


def grpo_on_totals(r: Rollouts, **how) -> torch.Tensor:
    of = r.trajectory_ids[r.spans["turn"].row]
    x = r.signals["turn_reward"].values
    totals = torch.zeros(r.num_trajectories, dtype=x.dtype).index_add(0, of, x.nan_to_num())
    known = torch.zeros(r.num_trajectories).index_add(0, of, (~x.isnan()).float()) > 0
    return group_relative(
        r.with_signals(total=Signal(torch.where(known, totals, NAN), "trajectory")), reward="total", **how
    ).advantages


@given(seed=SEEDS)
@tried
def test_without_recurring_states_it_is_grpo(seed):
    r = random_batch(seed)
    turns = r.spans["turn"]
    unique = Spans(turns.row, turns.start, turns.stop, turns.index, torch.randperm(len(turns)) * 10**12)
    want = grpo_on_totals(r)
    torch.testing.assert_close(gigpo(r, omega=0.0).advantages, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gigpo(r.with_spans(turn=unique), omega=3.0).advantages, want, rtol=1e-9, atol=1e-9)


@given(seed=SEEDS, scale=st.sampled_from(["std", None]))
@tried
def test_the_state_part_sums_to_zero_over_each_anchor_group(seed, scale):
    r = random_batch(seed)
    turns, part = r.spans["turn"], gigpo(r, scale=scale).parts["state"].values
    anchor = r.group_ids[turns.row] * 3 + turns.state
    assert torch.zeros(3 * r.num_groups, dtype=part.dtype).index_add(0, anchor, part).abs().max() < 1e-9


@given(seed=SEEDS, by=st.sampled_from([0.25, 50.0]))
@tried
def test_a_scale_of_the_rewards(seed, by):
    r = random_batch(seed)
    more = r.with_signals(turn_reward=Signal(r.signals["turn_reward"].values * by, "turn"))
    torch.testing.assert_close(gigpo(more, eps=0.0).advantages, gigpo(r, eps=0.0).advantages, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gigpo(more, scale=None).advantages, by * gigpo(r, scale=None).advantages, rtol=1e-9, atol=1e-9
    )


def test_two_groups_never_mix():
    one = [[("s", 1)], [("s", 0)]]
    both = played([*one, [("s", 5)], [("s", 3)]], groups=[0, 0, 1, 1])
    turns = both.spans["turn"]
    same_id = Spans(turns.row, turns.start, turns.stop, turns.index, torch.zeros_like(turns.row))
    credit = gigpo(both.with_spans(turn=same_id), scale=None)
    assert credit.advantages[:, 0].tolist() == [1.0, -1.0, 2.0, -2.0]


# ---- special cases -----------------------------------------------------------------------------------------------------------


def test_an_action_that_wastes_a_state_is_worse_than_the_productive_one():
    """Both games are won; the second looks around first and comes back to where it was."""
    seen = [["a hall", "a cellar"], ["a hall", "a hall", "a cellar"]]
    games = [[(s, float(k == len(g) - 1)) for k, s in enumerate(g)] for g in seen]
    credit = gigpo(played(games, width=2))
    assert (credit.parts["turn_reward"].values == 0).all()
    hall = credit.parts["state"].values[[0, 2, 3]]
    assert hall[1] < 0 < hall[0]
    assert hall[1] < hall[2]


def test_equal_totals_leave_the_state_part():
    credit = gigpo(played([[("a", 1), ("b", 0)], [("b", 0), ("a", 1)]]), scale=None, gamma=1.0)
    assert (credit.parts["turn_reward"].values == 0).all()
    assert credit.parts["state"].values.tolist() == [0.0, -0.5, 0.5, 0.0]


def test_a_single_trajectory_is_compared_with_itself():
    credit = gigpo(played([[("a", 0), ("b", 0), ("a", 1)]]), scale=None)
    assert credit.parts["turn_reward"].values.tolist() == [0.0]
    torch.testing.assert_close(credit.advantages, torch.tensor([[-0.04875, 0.0, 0.04875]], dtype=torch.float64))


def test_a_pair_with_deviation_always_gives_the_same():
    credit = gigpo(played([[("a", 1.0)], [("a", 0.999)]]))
    torch.testing.assert_close(
        credit.parts["state"].values, torch.tensor([0.5, -0.5], dtype=torch.float64) * 2**0.5, rtol=2e-3, atol=0
    )


def test_a_turn_without_tokens_counts_and_gets_nothing():
    r = Rollouts.from_lists([[1], [2]], [0, 0], dtype=torch.float64)
    turns = Spans(*torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0], [5, 6, 5]]))
    r = r.with_spans(turn=turns).with_signals(turn_reward=Signal(torch.tensor([0.0, 2.0, 1.0]).double(), "turn"))
    credit = gigpo(r, scale=None, gamma=0.5)
    assert credit.parts["state"].values.tolist() == [0.0, 0.0, 0.0]
    assert credit.advantages[:, 0].tolist() == [0.5, -0.5]


def test_unmeasured_rewards():
    games = [[("a", NAN), ("b", 1.0)], [("a", 0.0), ("b", 0.0)], [("a", NAN), ("b", NAN)]]
    credit = gigpo(played(games), scale=None, gamma=1.0)
    assert credit.advantages[:2].tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert credit.mask.tolist() == [[True] * 2, [True] * 2, [False] * 2]
    assert (credit.advantages[2] == 0).all()
    assert credit.notes["unmeasured_turns"] == 3


def test_actions_outside_every_turn_get_the_episode_part():
    r = played([[("a", 1)], [("a", 0)]])
    longer = Rollouts.from_lists([[1, 2], [1, 2]], [0, 0], dtype=torch.float64)
    r = longer.with_spans(turn=r.spans["turn"]).with_signals(turn_reward=r.signals["turn_reward"])
    assert gigpo(r, scale=None).advantages.tolist() == [[1.0, 0.5], [-1.0, -0.5]]


def test_messages():
    r = played()
    turns = r.spans["turn"]
    stateless = Spans(turns.row, turns.start, turns.stop, turns.index)
    with pytest.raises(ValueError, match=r'gigpo needs rollouts\.spans\["turn"\]\.state.*Say which spans begin'):
        gigpo(r.with_spans(turn=stateless))
    assert gigpo(r.with_spans(turn=stateless), omega=0.0).mask.any()
    with pytest.raises(ValueError, match=r"gigpo needs signals\['total'\] with shape \[S\]"):
        gigpo(r.with_signals(total=Signal(torch.ones(3), "trajectory")), reward="total")
    with pytest.raises(ValueError, match=r"episodes to be 'trajectory' or 'turn'; got 'turns'. Did you mean 'turn'"):
        gigpo(episodes="turns")
