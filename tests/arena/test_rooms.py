from collections import deque
from dataclasses import replace

import pytest
import torch

from apportion.arena import exact_advantage
from apportion.arena._methods import missing
from apportion.arena.worlds.rooms import ACTIONS, HANDS, Rooms
from apportion.credit import calm, capo, gae, gigpo, grpo, ma_rlhf, mle_agents, pure, remax, tempo, tp_grpo, vapo
from apportion.signals import anchor_states

MOVES = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}


class Map:
    """The rules again, on the drawn map and in plain Python. A situation is ((row, column), hands)."""

    def __init__(self, drawn):
        rows = drawn.splitlines()[1:-1]
        cells = {(r, c): x for r, row in enumerate(rows) for c, x in enumerate(row[1:-1])}
        found = {x: place for place, x in cells.items()}
        self.start, self.key, self.door, self.goal = (found[x] for x in "@k+*")
        self.floor = {place for place, x in cells.items() if x not in "#+"}

    def after(self, situation, action):
        """The next situation, "goal" behind the goal."""
        (row, column), hands = situation
        if action == "take" and hands == "no key" and (row, column) == self.key:
            return (row, column), "key"
        if action == "open" and hands == "key" and (row, column + 1) == self.door:
            return (row, column), "door open"
        if action in MOVES:
            to = (row + MOVES[action][0], column + MOVES[action][1])
            if to == self.goal:
                return "goal"
            if to in self.floor or (to == self.door and hands == "door open"):
                return to, hands
        return situation

    def distance(self, situation):
        """Turns of the shortest way to the goal."""
        known, queue = {situation: 0}, deque([situation])
        while queue:
            here = queue.popleft()
            if here == "goal":
                return known[here]
            for action in ACTIONS:
                there = self.after(here, action)
                if there not in known:
                    known[there] = known[here] + 1
                    queue.append(there)
        raise AssertionError("no way to the goal")


@pytest.fixture(scope="module")
def world():
    return Rooms(verdict_error=0.0)


@pytest.fixture(scope="module")
def episodes(world):
    return world.episodes(groups=256, size=8, seed=0)


def turns(episodes):
    """Row, position of the action and map of every turn."""
    spans = episodes.rollouts.spans["turn"]
    return spans.row, spans.stop - 1, episodes.prompts[episodes.rollouts.group_ids[spans.row]]


def read(world, episodes, row):
    """What row says: (situation, action) of each turn."""
    words = [world.words[t] for t in episodes.rollouts.tokens[row, : episodes.rollouts.lengths[row]].tolist()]
    places = [tuple(int(x) for x in reversed(word.split(","))) for word in words[0::3]]
    return list(zip(zip(places, words[1::3], strict=True), words[2::3], strict=True))


# ---- the maps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, {"length": 5}, {"length": 25}, {"size": 2}, {"size": 4, "length": 12}])
def test_every_map_has_the_shortest_way_that_was_asked_for(knobs):
    world = Rooms(**knobs)
    for prompt in range(world.prompts):
        drawn = Map(world.text(prompt))
        assert drawn.distance((drawn.start, "no key")) == world.length
    assert world.table.horizon == world.patience * world.length


def test_rollouts_obey_the_rules_and_turns_say_what_is_true(world, episodes):
    r = episodes.rollouts
    assert 0 < r.truncated.sum() < r.batch
    label, wrong = r.signals["label"].values, r.signals["judge"].values[:, 0]
    spans, subgoal, reward = r.spans["turn"], r.signals["subgoal"].values, r.signals["turn_reward"].values
    for row in range(0, 64, 3):
        drawn = Map(world.text(int(episodes.prompts[r.group_ids[row]])))
        story, mine = read(world, episodes, row), (spans.row == row).nonzero()[:, 0]
        assert len(story) == len(mine) <= world.table.horizon
        assert story[0][0] == (drawn.start, "no key")
        lost = []
        for t, (situation, action) in enumerate(story):
            then, s = drawn.after(situation, action), mine[t]
            assert spans.index[s] == t
            assert then == (story[t + 1][0] if t + 1 < len(story) else then)
            ended = then == "goal"
            lost.append(1 + (0 if ended else drawn.distance(then)) - drawn.distance(situation))
            gained = [HANDS.index(then[1]) > HANDS.index(situation[1]) == i for i in range(2)] if not ended else [0, 0]
            assert subgoal[s].tolist() == gained
            assert reward[s] == ended
            assert bool(wrong[s]) == (lost[-1] > 0)
            moved = then != situation
            assert label[s] == (not wrong[s] if r.signals["outcome"].values[row] else moved)
        assert ended == bool(r.signals["outcome"].values[row]) == (not r.truncated[row])
        expected = [3 * lost.index(2) + 2] if 2 in lost else []
        assert episodes.mistake[row].nonzero()[:, 0].tolist() == expected


def test_a_map_can_be_drawn_at_any_moment(world):
    start = world.text(0)
    cells = world.table.logits.shape[1] // 3
    later = world.text(0, int(world.table.start[0]) + 2 * cells)
    assert later == start.replace("k", ".").replace("+", "/")


# ---- exactness ------------------------------------------------------------------------------------------------------------


def test_expected_advantage_is_zero_in_every_state(world):
    table = world.table
    assert (table.policy[:, None] * table.advantages).sum(-1).abs().max() < 1e-12


def test_sampling_gives_the_exact_values(world, episodes):
    table, outcome = world.table, episodes.rollouts.signals["outcome"].values
    exact = table.values[torch.arange(world.prompts), 0, table.start]
    prompt = episodes.prompts[episodes.rollouts.group_ids]
    for k in range(world.prompts):
        mine = outcome[prompt == k]
        error = (exact[k] * (1 - exact[k]) / len(mine)).sqrt()
        assert (mine.mean() - exact[k]).abs() < 4 * error
    assert 0.3 < outcome.mean() < 0.5


def test_the_outcome_after_a_choice_is_q_on_average(world):
    """outcome - Q(s, a) has mean 0 given the choice: its sum over any set of first choices is a sum of such terms."""
    episodes = world.episodes(groups=512, size=8, seed=5)
    row, at, _ = turns(episodes)
    spans, values = episodes.rollouts.spans["turn"], exact_values(world, episodes)
    q = values + episodes.advantages[row, at]
    rest = episodes.rollouts.signals["outcome"].values[row] - q
    action = episodes.rollouts.tokens[row, at]
    for turn in (0, 5, 20):
        for a in range(len(ACTIONS)):
            mine = rest[(spans.index == turn) & (action == a)]
            assert mine.mean().abs() < 4 * mine.std() / len(mine) ** 0.5


def exact_values(world, episodes):
    spans = episodes.rollouts.spans["turn"]
    return world.table.values[episodes.prompts[episodes.rollouts.group_ids[spans.row]], spans.index, spans.state]


def test_gradients_of_exact_advantages_meet_the_gradient_on_average():
    world = Rooms(prompts=1)
    episodes = world.episodes(groups=600, size=8, seed=3)
    found = episodes.gradients(episodes.advantages)
    assert found.shape == episodes.gradient.shape == (600, world.table.logits[0].numel())
    exact = episodes.gradient[0]
    directions = torch.randn(10, len(exact), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in [exact, *directions]:
        along = found @ direction
        assert (along.mean() - exact @ direction).abs() < 4 * along.std() / len(along) ** 0.5


def test_the_gradient_is_the_slope_of_the_expected_outcome(world):
    table, step = world.table, 1e-5
    direction = torch.randn(table.logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def start(logits):
        other = replace(table, logits=logits)
        return other.values[torch.arange(world.prompts), 0, table.start]

    slope = (start(table.logits + step * direction) - start(table.logits - step * direction)) / (2 * step)
    torch.testing.assert_close((table.gradient * direction.flatten(1)).sum(1), slope, rtol=1e-6, atol=1e-8)


def test_decisive_are_situations_where_q_differs(world, episodes):
    row, at, prompt = turns(episodes)
    spans = episodes.rollouts.spans["turn"]
    q = world.table.q[prompt, spans.index, spans.state]
    assert torch.equal(episodes.decisive[row, at], q.amax(-1) - q.amin(-1) > 0.1)
    assert not (episodes.decisive & ~episodes.rollouts.action_mask).any()
    assert 0.3 < episodes.decisive[row, at].double().mean() < 0.9


# ---- positions ------------------------------------------------------------------------------------------------------------


def test_observations_stand_between_actions_and_change_nothing_else(world, episodes):
    alone = replace(world, observe=False).episodes(groups=256, size=8, seed=0)
    r, s = episodes.rollouts, alone.rollouts
    assert torch.equal(r.lengths, 3 * s.lengths)
    assert torch.equal(r.action_mask[:, 2::3], s.action_mask)
    assert r.action_mask.sum() == s.action_mask.sum()
    where = s.action_mask
    for name in ("tokens", "logprobs", "ref_logprobs", "values"):
        assert torch.equal(getattr(r, name)[:, 2::3][where], getattr(s, name)[where])
    for name in ("advantages", "decisive", "mistake", "pairs"):
        assert torch.equal(getattr(episodes, name)[:, 2::3], getattr(alone, name))
    for name in ("entropy", "sum_pi_squared", "exact"):
        assert torch.equal(r.signals[name].values[:, 2::3], s.signals[name].values)
    for method in (gigpo(), gae(over="turn"), capo(), tempo()):
        here, there = method(r).advantages, method(s).advantages
        torch.testing.assert_close(here[:, 2::3], there)
        torch.testing.assert_close(episodes.gradients(here), alone.gradients(there))


def test_pairs_are_equal_where_map_turn_situation_and_action_are(world, episodes):
    row, at, prompt = turns(episodes)
    spans, r = episodes.rollouts.spans["turn"], episodes.rollouts
    choices = torch.stack([prompt, spans.index, spans.state, r.tokens[row, at]], 1)
    _, expected = torch.unique(choices, dim=0, return_inverse=True)
    _, found = torch.unique(episodes.pairs[row, at], return_inverse=True)
    assert torch.equal(found, expected)
    assert (episodes.pairs[~r.action_mask] == -1).all()


def test_a_state_recurs_iff_the_same_was_seen(episodes):
    """`anchor_states` of the observations and the states of the table part the turns of a group alike."""
    r, spans = episodes.rollouts, episodes.rollouts.spans["turn"]
    seen = list(
        zip(r.tokens[spans.row, spans.start].tolist(), r.tokens[spans.row, spans.start + 1].tolist(), strict=True)
    )
    anchors = anchor_states(seen, r.group_ids[spans.row])
    _, expected = torch.unique(anchors, return_inverse=True)
    mine = r.group_ids[spans.row] * 10_000 + spans.state
    both = torch.stack([expected, mine], 1).unique(dim=0)
    assert len(both) == len(expected.unique()) == len(mine.unique())
    notes = gigpo()(r).notes
    assert notes["turns_alone"] < 0.05
    assert notes["anchor_group_size"] > 5


# ---- what is measured -------------------------------------------------------------------------------------------------------


def test_turn_rewards_add_up_to_the_outcome_even_if_the_verifier_errs():
    episodes = Rooms(verifier_error=0.3).episodes(groups=256, size=8, seed=0)
    r = episodes.rollouts
    total = torch.zeros(r.batch, dtype=torch.float64)
    total.index_add_(0, r.spans["turn"].row, r.signals["turn_reward"].values)
    assert torch.equal(total, r.signals["outcome"].values)
    flipped = (r.signals["outcome"].values == 1) == r.truncated
    assert abs(flipped.double().mean() - 0.3) < 4 * (0.3 * 0.7 / r.batch) ** 0.5


def test_verdicts_are_flipped_at_the_rate_asked_for(world):
    true, said = (replace(world, verdict_error=x).episodes(256, 4, 0).rollouts.signals for x in (0.0, 0.25))
    for name in ("judge", "process", "label", "subgoal"):
        flips = (true[name].values != said[name].values).double().flatten()
        assert abs(flips.mean() - 0.25) < 4 * (0.25 * 0.75 / len(flips)) ** 0.5


def test_the_critic_errs_as_much_as_asked_for(world):
    exact, noisy = (replace(world, critic_error=x).episodes(64, 4, 0) for x in (0.0, 0.2))
    row, at, _ = turns(exact)
    assert torch.equal(exact.rollouts.values[row, at], exact_values(world, exact))
    assert torch.equal(exact.rollouts.values[row, at], exact.rollouts.values[row, at - 2])
    _, first = torch.unique(exact.pairs[row, at] // len(ACTIONS), return_inverse=True)
    errors = torch.zeros(int(first.max()) + 1, dtype=torch.float64)
    errors[first] = (noisy.rollouts.values - exact.rollouts.values)[row, at]  # one for each situation and turn
    assert abs(errors.std() - 0.2) < 4 * 0.2 / (2 * len(errors)) ** 0.5


def test_without_verifier_and_critic_errors_gae_is_right_on_average():
    world = Rooms(prompts=1, critic_error=0.0)
    episodes = world.episodes(groups=64, size=8, seed=0)
    acted = episodes.rollouts.action_mask
    # lam = 0 with the exact V in a deterministic world is the exact advantage
    torch.testing.assert_close(
        gae(lam=0.0)(episodes.rollouts).advantages[acted].double(), episodes.advantages[acted], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "method",
    [
        calm(),
        capo(),
        gae(over="turn"),
        gigpo(),
        grpo(),
        ma_rlhf(),
        mle_agents(),
        pure(),
        remax(),
        tempo(),
        tp_grpo(),
        vapo(),
    ],
    ids=str,
)
def test_methods_run_here(method, episodes):
    assert missing(method, episodes.rollouts) == []
    credit = method(episodes.rollouts)
    assert credit.advantages.isfinite().all()
    assert torch.equal(credit.mask, episodes.rollouts.action_mask)


def test_durations_and_macro_actions(world, episodes):
    r = episodes.rollouts
    row, at, _ = turns(episodes)
    slow = r.tokens[row, at] == ACTIONS.index("open")
    assert torch.equal(r.signals["duration"].values, torch.where(slow, 3.0, 1.0).double())
    macro = r.span_ids("macro")
    assert torch.equal(macro >= 0, torch.arange(r.width) < r.lengths[:, None])
    assert set(torch.bincount(macro[r.action_mask]).tolist()) == {1, 2, 3, 4, 5}


def test_costs_name_what_methods_require(episodes):
    turn_count = float(episodes.rollouts.action_mask.sum(1).double().mean())
    assert episodes.costs["signals.subgoal"].judge_calls == pytest.approx(turn_count)
    assert episodes.costs["values"].passes == 1
    assert 0 < episodes.costs["signals.greedy_outcome"].tokens <= 40 / 8


# ---- knobs ------------------------------------------------------------------------------------------------------------------


def test_same_seed_same_episodes(world, episodes):
    again, other = world.episodes(256, 8, 0), world.episodes(256, 8, 1)
    assert torch.equal(again.rollouts.tokens, episodes.rollouts.tokens)
    assert all(torch.equal(s.values, episodes.rollouts.signals[k].values) for k, s in again.rollouts.signals.items())
    assert not torch.equal(other.rollouts.tokens, episodes.rollouts.tokens)
    assert torch.equal(other.gradient, episodes.gradient)


def test_skill_and_patience_raise_success_and_length_does_not_lower_it_much():
    def success(world):
        return float(world.table.values[torch.arange(world.prompts), 0, world.table.start].mean())

    assert success(Rooms(skill=0.5)) < success(Rooms()) < success(Rooms(skill=2.0))
    assert success(Rooms(patience=2)) < success(Rooms()) < success(Rooms(patience=8))
    assert all(0.25 < success(Rooms(length=n)) < 0.6 for n in (6, 10, 20, 40))


def test_another_policy_can_be_played(world):
    table = replace(world.table, logits=world.table.advantages.mean(1) * 100)
    episodes = world.played(table, 32, 8, 0)
    assert episodes.rollouts.signals["outcome"].values.mean() > 0.8
    row, at, prompt = turns(episodes)
    spans, tokens = episodes.rollouts.spans["turn"], episodes.rollouts.tokens
    expected = table.advantages[prompt, spans.index, spans.state, tokens[row, at]]
    assert torch.equal(exact_advantage()(episodes.rollouts).advantages[row, at].double(), expected)
    chance = table.policy[prompt, spans.state, tokens[row, at]]
    torch.testing.assert_close(episodes.rollouts.logprobs[row, at].exp(), chance)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"length": 4}, "Rooms needs length to be at least 5; got 4. Raise length."),
        ({"size": 1}, "Rooms needs size to be at least 2; got 1. Raise size."),
        ({"patience": 0}, "Rooms needs patience to be at least 1; got 0. Raise patience."),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError) as error:
        Rooms(**knobs)
    assert str(error.value) == message


def test_rooms_too_large_for_the_way():
    with pytest.raises(
        ValueError, match=r"of 8 maps of size 30 whose shortest way takes 6 turns\. Raise length or lower"
    ):
        Rooms(size=30, length=6).episodes(2, 2, 0)
