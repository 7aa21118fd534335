"""Loops and rooms: fetch a key, open a door, find the goal. Walks wander in loops, and everything is known exactly."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.arena._episodes import Cost, Episodes
from apportion.arena._measuring import COSTS, chunks, critic, from_walk, thought_label, verdicts
from apportion.arena._tables import Table, Walk
from apportion.types import Rollouts, Signal, Spans

ACTIONS = ("north", "south", "west", "east", "take", "open")
HANDS = ("no key", "key", "door open")
_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
_TAKE, _OPEN = 4, 5
_SECONDS = (1.0, 1.0, 1.0, 1.0, 1.0, 3.0)  # of each action: doors are slow
_HABIT = 0.5  # deviation of the logits: more, and single cells of a corridor hold up everybody
_DECISIVE = 0.1  # largest minus smallest Q of a state
_MACRO = 5  # turns of a macro action


@dataclass(frozen=True)
class Rooms:
    """A room with a key in it, a door, a corridor, and a room with the goal; every prompt is a map of its own.

    The outcome is 1 if the goal is reached in time. A situation is a place and what the hands hold (`HANDS`), and the
    policy, a softmax table over `ACTIONS`, sees nothing else: walks run in loops, and a group meets the same situations
    again and again (`Spans.state`). The turns that are left are not seen, but Q depends on them.

    An action is right if it brings the goal one turn nearer. All others are waste, and the wrong ones for a judge: those
    that do nothing lose a turn, those that lead away lose two. Few rollouts are without waste, so `Episodes.mistake` is
    the first action that leads away. Decisive are situations where the best and the worst Q differ by more than 0.1.

    Turns are steps, and 5 turns are a macro action. Subgoals are that the key was taken and that the door was opened;
    a judge sees them, with `verdict_error` like all verdicts. A try at a door takes 3 seconds, any other action 1.

    Args:
        prompts: how many maps.
        size: cells along the side of each room.
        length: turns of the shortest way to the goal, the same for all maps; the corridor is made to fit.
        patience: turns allowed for each turn of the shortest way.
        skill: added to the logit of right actions: what the policy already knows.
        observe: in each turn the policy first reads where it is and what it holds, two tokens that carry no credit;
            False = a rollout is its actions and nothing else.
        verifier_error: chance that the verifier says the opposite of the truth.
        verdict_error: chance that a verdict about a turn is the opposite of the truth.
        critic_error: deviation of the critic's V from the exact one.

    Example:
        >>> print(Rooms().text(1))
        ##########
        #k@.##...#
        #...+..*.#
        #...##...#
        ##########
    """

    prompts: int = 8
    size: int = 3
    length: int = 10
    patience: int = 4
    skill: float = 1.25
    observe: bool = True
    verifier_error: float = 0.0
    verdict_error: float = 0.1
    critic_error: float = 0.1

    def __post_init__(self) -> None:
        least = {"prompts": 1, "size": 2, "length": 5, "patience": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"Rooms needs {name} to be at least {low}; got {getattr(self, name)}. Raise {name}.")

    # ---- the maps -----------------------------------------------------------------------------------------------------

    @cached_property
    def _maps(self) -> "_Maps":
        """Start, key, door and goal at random, among the maps whose way is not too long without a corridor."""
        n, generator = self.size, torch.Generator().manual_seed(17)
        drawn = torch.randint(n, (7, 10_000 + 100 * self.prompts), generator=generator)
        row, column, key_row, key_column, door_row, goal_row, goal_column = drawn
        to_key = (row - key_row).abs() + (column - key_column).abs()
        to_door = (key_row - door_row).abs() + n - 1 - key_column
        to_goal = (door_row - goal_row).abs() + goal_column
        corridor = self.length - 4 - to_key - to_door - to_goal  # 4: take, open, and two moves through the door
        fit = ((corridor >= 0) & (to_key > 0)).nonzero()[: self.prompts, 0]
        if len(fit) < self.prompts:
            raise ValueError(
                f"Rooms found {len(fit)} of {self.prompts} maps of size {n} whose shortest way takes {self.length} turns. "
                "Raise length or lower size."
            )
        corridor, door_row = corridor[fit], door_row[fit]
        width = 2 * n + 1 + int(corridor.max())
        cell = torch.arange(n * width)
        at_row, at_column = cell // width, cell % width
        beyond = at_column - (n + 1 + corridor[:, None])  # columns behind the corridor
        inside = (at_column < n) | ((beyond >= 0) & (beyond < n))
        inside |= (at_row == door_row[:, None]) & (at_column > n) & (beyond < 0)
        return _Maps(
            width=width,
            floor=inside,
            start=(row * width + column)[fit],
            key=(key_row * width + key_column)[fit],
            door=door_row * width + n,
            goal=goal_row[fit] * width + n + 1 + corridor + goal_column[fit],
        )

    def text(self, prompt: int = 0, state: int | None = None) -> str:
        """The map for people: @ stands in `state` (None: at the start), k key, + door (/ when open), * goal, # wall."""
        maps, cells = self._maps, self.size * self._maps.width
        hands, place = divmod(int(maps.start[prompt]) if state is None else state, cells)
        drawn = ["." if x else "#" for x in maps.floor[prompt].tolist()]
        drawn[int(maps.door[prompt])] = "/" if HANDS[hands] == "door open" else "+"
        drawn[int(maps.goal[prompt])] = "*"
        if HANDS[hands] == "no key":
            drawn[int(maps.key[prompt])] = "k"
        drawn[place] = "@"
        columns = int((maps.floor[prompt].nonzero() % maps.width).max()) + 1
        inner = ["#" + "".join(drawn[i : i + columns]) + "#" for i in range(0, cells, maps.width)]
        return "\n".join(["#" * (columns + 2), *inner, "#" * (columns + 2)])

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary of the rollouts: actions, what the hands hold, places as column,row."""
        width = self._maps.width
        places = (f"{i % width},{i // width}" for i in range(self.size * width))
        return (*ACTIONS, *HANDS, *places)

    @cached_property
    def _world(self) -> tuple[Table, Tensor]:
        """The table, and by how many turns each choice misses the right one: 0, 1 or 2, [K, S, A]."""
        maps = self._maps
        follows, goal = _follows(maps, self.size)
        before, after = _distances(follows)
        lost = after + 1 - before[..., None]
        generator = torch.Generator().manual_seed(17)
        noise = torch.randn(follows.shape, generator=generator, dtype=torch.float64)
        logits = _HABIT * noise + torch.where(lost == 0, self.skill, 0.0)
        return Table(logits, follows, goal.double(), maps.start, self.patience * self.length), lost

    @property
    def table(self) -> Table:
        """What the rooms are. A state is `hands * cells + cell`."""
        return self._world[0]

    # ---- episodes -----------------------------------------------------------------------------------------------------

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """As `World.episodes`."""
        return self.played(self.table, groups, size, seed)

    def played(self, table: Table, groups: int, size: int, seed: int) -> Episodes:
        """Episodes of another policy in these rooms: `replace(world.table, logits=...)`."""
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.arange(groups) % self.prompts
        group_ids = torch.arange(groups).repeat_interleave(size)
        walk = table.walk(prompts[group_ids], generator)
        greedy = table.walk(prompts)
        turns = float(walk.lengths.double().mean())
        lost = torch.where(walk.used, self._world[1][walk.prompts[:, None], walk.states, walk.actions], 0)
        away = lost == 2
        spread = table.q.amax(-1) - table.q.amin(-1)
        return Episodes(
            rollouts=self._measured(table, walk, greedy, lost > 0, group_ids, generator),
            advantages=self._laid(table.at(table.advantages, walk)),
            decisive=self._laid(table.at(spread, walk) > _DECISIVE),
            mistake=self._laid(away & (away.cumsum(1) == 1)),
            pairs=self._laid(table.pairs(walk), -1),
            prompts=prompts,
            gradients=lambda weights: table.scores(walk, weights[:, self._per_turn - 1 :: self._per_turn], group_ids),
            gradient=table.gradient[prompts],
            costs={
                **COSTS,
                "signals.subgoal": Cost(judge_calls=turns),
                "signals.greedy_outcome": Cost(tokens=float(greedy.lengths.double().mean()) / size),
            },
            seed=seed,
        )

    def _measured(
        self, table: Table, walk: Walk, greedy: Walk, wrong: Tensor, groups: Tensor, generator: torch.Generator
    ) -> Rollouts:
        """The rollouts of a walk with every signal of this world."""
        row, turn = walk.used.nonzero(as_tuple=True)
        per, states, actions = self._per_turn, walk.states[row, turn], walk.actions[row, turn]
        turns = Spans(row, turn * per, (turn + 1) * per, turn, states)
        flipped = torch.rand(len(groups), generator=generator) < self.verifier_error
        outcome = torch.where(flipped, 1 - walk.outcome, walk.outcome)
        hands = torch.stack([actions == _TAKE, actions == _OPEN], 1)
        moved = table.follows[walk.prompts[row], states, actions] != states
        achieved = hands & moved[:, None]
        misjudged = torch.rand(achieved.shape, generator=generator) < self.verdict_error
        values = table.at(critic(table.values, self.critic_error, seed=1), walk)
        macro = chunks(walk.lengths, _MACRO)
        r = self._seen(from_walk(walk, groups, table), walk)
        return r.replace(
            values=values.repeat_interleave(per, 1),
            spans={
                "turn": turns,
                "step": turns,
                "macro": Spans(macro.row, macro.start * per, macro.stop * per, macro.index),
            },
        ).with_signals(
            outcome=Signal(outcome, "trajectory"),
            turn_reward=Signal(torch.where(turn == walk.lengths[row] - 1, outcome[row], 0.0), "turn"),
            subgoal=Signal((achieved ^ misjudged).double(), "turn", ("subgoals",)),
            duration=Signal(torch.tensor(_SECONDS, dtype=torch.float64)[actions], "turn"),
            greedy_outcome=Signal(greedy.outcome, "group"),
            **verdicts(wrong[row, turn], self.verdict_error, generator),
            **thought_label(wrong[row, turn], moved, outcome[row] == 1, self.verdict_error, generator),
        )

    # ---- from choices to positions ------------------------------------------------------------------------------------

    @property
    def _per_turn(self) -> int:
        """Positions of a turn; its action is the last."""
        return 3 if self.observe else 1

    def _laid(self, values: Tensor, fill: float = 0) -> Tensor:
        """From one value per choice, [B, H], to positions, [B, T], with `fill` at observations."""
        out = values.new_full((*values.shape, self._per_turn), fill)
        out[..., -1] = values
        return out.flatten(1)

    def _seen(self, r: Rollouts, walk: Walk) -> Rollouts:
        """Rollouts of choices with what was seen before each."""
        if not self.observe:
            return r
        hands, place = walk.states // self._maps.floor.shape[1], walk.states % self._maps.floor.shape[1]
        tokens = torch.stack([len(ACTIONS + HANDS) + place, len(ACTIONS) + hands, walk.actions], 2)
        used = walk.used[..., None].expand_as(tokens).flatten(1)
        return r.replace(
            tokens=torch.where(used, tokens.flatten(1), 0),
            lengths=r.lengths * self._per_turn,
            **{name: self._laid(getattr(r, name)) for name in ("action_mask", "logprobs", "ref_logprobs")},
            signals={
                name: Signal(self._laid(s.values), "token") if s.unit == "token" else s for name, s in r.signals.items()
            },
        )


@dataclass(frozen=True)
class _Maps:
    """Maps on a common grid without its outer wall; cells are numbered row by row.

    Args:
        width: cells of a row.
        floor: cells to walk on; the door's is not, [K, cells].
        start, key, door, goal: cells, [K].
    """

    width: int
    floor: Bool[Tensor, "K cells"]
    start: Int[Tensor, " K"]
    key: Int[Tensor, " K"]
    door: Int[Tensor, " K"]
    goal: Int[Tensor, " K"]


def _follows(maps: _Maps, rows: int) -> tuple[Int[Tensor, "K S A"], Bool[Tensor, "K S A"]]:
    """The next state of every choice, -1 at the goal, and whether it is the goal. What is impossible changes nothing."""
    count, cells = maps.floor.shape
    k, cell = torch.arange(count), torch.arange(cells)
    row, column = cell // maps.width, cell % maps.width
    place = cell[:, None].repeat(count, len(HANDS), 1, len(ACTIONS))
    for hands in range(len(HANDS)):
        free = maps.floor.clone()
        free[k, maps.door] = hands == 2
        for a, (down, right) in enumerate(_MOVES):
            r, c = row + down, column + right
            to = torch.where((r >= 0) & (r < rows) & (c >= 0) & (c < maps.width), r * maps.width + c, cell)
            place[:, hands, :, a] = torch.where(free[:, to], to, cell)
    holding = torch.arange(len(HANDS))[:, None, None].repeat(count, 1, cells, len(ACTIONS))
    holding[k, 0, maps.key, _TAKE] = 1
    holding[k, 1, maps.door - 1, _OPEN] = 2
    goal = (place == maps.goal[:, None, None, None]).flatten(1, 2)
    return torch.where(goal, -1, (holding * cells + place).flatten(1, 2)), goal


def _distances(follows: Int[Tensor, "K S A"]) -> tuple[Int[Tensor, "K S"], Int[Tensor, "K S A"]]:
    """Turns of the shortest way to the goal from every state, and after every choice; S where there is none."""
    k, far = torch.arange(len(follows))[:, None, None], follows.shape[1]
    before = torch.full_like(follows[..., 0], far)
    while True:
        after = torch.where(follows < 0, 0, before[k, follows])
        nearer = (after.amin(-1) + 1).clamp(max=far)
        if torch.equal(nearer, before):
            return before, after
        before = nearer
