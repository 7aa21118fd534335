"""Rollouts of several turns: the policy writes, its environment answers, until one of them or a limit ends it."""

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from time import monotonic
from typing import Any

import torch

from apportion.signals import anchor_states
from apportion.tasks import Environment, Problem, Reply, Task
from apportion.train.asking import Failure, answered, begun
from apportion.train.policy import CausalPolicy, Request, check_lengths
from apportion.train.rows import Row, rollouts_of, text_of
from apportion.train.sampler import Sampled, Sampling, uniform_numbers
from apportion.types import Rollouts, Signal, Spans


class EnvironmentFailed(ValueError):
    """An environment raised, hung or answered with something else than a `Reply`; names rollout, problem and turn."""


def converse(
    policy: CausalPolicy,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    environment: Callable[[Problem], Environment],
    max_turns: int,
    tool_seconds: float,
    generator: torch.Generator,
    statistics: Sequence[str] = (),
    on_rows: Callable[[int], None] | None = None,
) -> Rollouts:
    """One row per rollout: prompt, turn, reply, turn, ...; one group per request.

    The tokens that the policy wrote are the row's, never tokenised again; replies have `action_mask` False. A rollout
    ends when its environment says so, and counts as truncated when a turn reached `max_new_tokens` or the end of the
    context, when a reply left no room for another turn, or after `max_turns`. A turn that was cut is not answered. All
    rollouts write their turns together; each is answered in a thread of its own, while others still write.

    A row's random numbers depend on `generator`, its place and the number of rows, not on when others end, and the first
    turn is that of `policy.sample`.

    Adds to what `policy.sample` gives: the spans "turn", with `state` where the environment tells it; the signal
    "turn_reward" over them; the signal "environment", a trajectory's measured turn rewards added up, NaN if there is none;
    and meta["transcript"], all that follows the prompt, as the policy read it. meta["text"] holds what the policy wrote,
    one turn after the other with a line break between.

    Args:
        sampling: of each turn; the environments' `stop` texts are added.
        environment: makes the environment of a rollout.
        max_turns: most turns of the policy in a rollout; the last is answered too.
        tool_seconds: longest wait for the making of an environment and for each answer.
        generator: of the random numbers. statistics, on_rows: as in `policy.sample`.

    Raises:
        EnvironmentFailed: an environment raised, took longer than `tool_seconds` or gave no `Reply`.
        ValueError: a prompt leaves no room for a turn.
    """
    prompts = [policy.prompt_ids(r.problem) for r in requests]
    check_lengths(prompts, [r.problem.id for r in requests], sampling.max_new_tokens, policy.context)
    rows = [Row(g, r.problem, prompts[g]) for g, r in enumerate(requests) for _ in range(r.count)]
    with _opened(rows, environment, tool_seconds) as rollouts:
        stop = dict.fromkeys([*sampling.stop, *(text for x in rollouts for text in x.environment.stop)])
        drawn = replace(sampling, stop=tuple(stop))

        def write(live: Sequence[_Rollout]) -> Iterator[list[Sampled]]:
            uniform = uniform_numbers(len(rows), sampling, generator)  # for all: no row depends on another's end
            begun = [list(same) for _, same in groupby(live, key=lambda x: (x.row.group, x.row.tokens))]
            room = [min(sampling.max_new_tokens, policy.context - len(same[0].row.tokens)) for same in begun]
            return policy.continued(
                [same[0].row.tokens for same in begun],
                [len(same) for same in begun],
                drawn,
                uniform[[x.number for x in live]],
                statistics,
                room if min(room) < sampling.max_new_tokens else None,
            )

        _play(policy, rollouts, write, max_turns, tool_seconds, on_rows)
    return _with_turns(rollouts, policy)


def demonstrated(
    policy: CausalPolicy,
    problems: Sequence[Problem],
    *,
    environment: Callable[[Problem], Environment],
    max_new_tokens: int,
    max_turns: int,
    tool_seconds: float,
) -> Rollouts:
    """The rows of `converse`, with the turns of the worked solutions in place of the policy's; one group per problem.

    A solution is what the policy should write in all its turns: a turn ends behind a text of the environment's `stop`,
    and the last one with the solution and an end token. What the environment answers stands between, as it does later.

    Raises:
        ValueError: a problem offers no solution, a turn is longer than `max_new_tokens`, or the environment ends before the
            solution does, or after it.
        EnvironmentFailed: as in `converse`.
    """
    rows = [Row(g, p, policy.prompt_ids(p)) for g, p in enumerate(problems)]
    with _opened(rows, environment, tool_seconds) as rollouts:
        scripts = [_script(policy, x.row.problem, x.environment.stop, max_new_tokens) for x in rollouts]

        def write(live: Sequence[_Rollout]) -> Iterator[list[Sampled]]:
            for x in live:
                done = len(x.row.turns)
                ids = scripts[x.number][done] if done < len(scripts[x.number]) else []
                yield [Sampled(ids, [0.0] * len(ids), truncated=not ids)]

        _play(policy, rollouts, write, max_turns, tool_seconds, None)
        for x, script in zip(rollouts, scripts, strict=True):
            if x.row.truncated or len(x.row.turns) != len(script):
                raise ValueError(
                    f"{x.name} does not end with the worked solution, which has {len(script)} turns: it was over after "
                    f"{len(x.row.turns)}, or wanted more, or ran into max_turns ({max_turns}) or the context."
                )
    return _with_turns(rollouts, policy)


def supplied(task: Task) -> set[str]:
    """What the rollouts of this task have besides those of any other: nothing, or what its environment measures."""
    make = getattr(task, "environment", None)
    if make is None or not task.train:
        return set()
    first: Environment = make(task.train[0])
    told = first.state is not None
    first.close()
    return {"spans.turn", "signals.turn_reward", "signals.environment"} | ({"spans.turn.state"} if told else set())


# ---- turn by turn -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Rollout:
    """A row, its environment, the reward of each of its turns, and the state in which each began."""

    number: int
    row: Row
    environment: Environment
    states: list[Hashable]
    rewards: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"the environment of rollout {self.number} (problem {self.row.problem.id})"


def _play(
    policy: CausalPolicy,
    rollouts: Sequence[_Rollout],
    write: Callable[[Sequence[_Rollout]], Iterator[list[Sampled]]],
    max_turns: int,
    seconds: float,
    on_rows: Callable[[int], None] | None,
) -> None:
    """All turns of all rollouts; `write` gives the next turn of each, and while it is still at work the first are answered."""
    live = rollouts
    for turn in range(max_turns):
        if not live:
            break
        calls = []
        for x, sampled in zip(live, (s for group in write(live) for s in group), strict=True):
            x.row.wrote(sampled)
            text = text_of(policy.tokenizer, sampled.tokens)
            calls.append((text, None if sampled.truncated else _Call(_answer, x.environment, text)))
        last = turn + 1 == max_turns
        going = [x for x, call in zip(live, calls, strict=True) if _goes_on(policy, x, *call, seconds, last)]
        if on_rows:
            on_rows(len(live) - len(going))
        live = going


def _goes_on(policy: CausalPolicy, x: _Rollout, text: str, call: "_Call | None", seconds: float, last: bool) -> bool:
    """Take the answer to the turn that was written; whether the policy writes another."""
    if call is None:
        x.rewards.append(x.environment.cut_reward)
        return False
    reply, state = call.result(seconds, f"{x.name}, asked to answer turn {len(x.row.turns)}, {text[:200]!r},")
    x.rewards.append(reply.reward)
    if reply.text is None:
        return False
    start, stop = x.row.turns[-1]
    ids = policy.reply_ids(x.row.problem, x.row.tokens[start:stop], reply)
    if last or len(x.row.tokens) + len(ids) >= policy.context:
        x.row.truncated = True
        return False
    x.row.read(ids)
    x.states.append(state)
    return True


def _with_turns(rollouts: Sequence[_Rollout], policy: CausalPolicy) -> Rollouts:
    """The rows as a batch, with what the environments measured."""
    rows = [x.row for x in rollouts]
    batch = rollouts_of(rows, policy.tokenizer)
    turns = Spans.from_lists([row.turns for row in rows])
    states = [state for x in rollouts for state in x.states]
    if any(state is not None for state in states):
        turns = replace(turns, state=anchor_states(states, batch.group_ids[turns.row]))
    known = [[r for r in x.rewards if not math.isnan(r)] for x in rollouts]
    paid = torch.tensor([sum(rewards) if rewards else math.nan for rewards in known])
    transcripts = [text_of(policy.tokenizer, row.tokens[row.turns[0][0] :], special=True) for row in rows]
    return (
        replace(batch, meta={**batch.meta, "transcript": transcripts})
        .with_spans(turn=turns)
        .with_signals(
            turn_reward=Signal(torch.tensor([r for x in rollouts for r in x.rewards]), "turn"),
            environment=Signal(paid, "trajectory"),
        )
        .to(policy.model.device)
    )


def _script(policy: CausalPolicy, problem: Problem, stop: Sequence[str], limit: int) -> list[list[int]]:
    """The turns of the worked solution, as tokens."""
    if problem.solution is None:
        raise ValueError(
            f"warm-up needs worked solutions, but problem {problem.id} has none. Use a task that offers them, or warmup=0."
        )
    ends = "|".join(re.escape(text) for text in stop)
    parts = re.findall(rf"(?s).+?(?:{ends}|\Z)" if ends else r"(?s).+", problem.solution)
    turns = []
    for part in parts:
        ids = list(policy.tokenizer(part, add_special_tokens=False)["input_ids"])
        turns.append(ids if part.endswith(tuple(stop)) else [*ids, policy.end_ids[-1]])
    longest = max(map(len, turns))
    if longest > limit:
        raise ValueError(
            f"a turn of the worked solution of problem {problem.id} has {longest} tokens, but a turn may have {limit}: the "
            "warm-up would teach what is then cut. Raise max_new_tokens."
        )
    return turns


# ---- environments -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(
    rows: Sequence[Row], environment: Callable[[Problem], Environment], seconds: float
) -> Iterator[list[_Rollout]]:
    """An environment for every row; all of them are closed in the end."""
    making = [_Call(_made, environment, row.problem) for row in rows]
    rollouts: list[_Rollout] = []
    closing: list[_Call] = []
    try:
        for number, (row, call) in enumerate(zip(rows, making, strict=True)):
            made = call.result(seconds, f"making the environment of rollout {number} (problem {row.problem.id})")
            rollouts.append(_Rollout(number, row, made, [made.state]))
        yield rollouts
    finally:
        closing = [_Call(call.future.result().close) for call in making if call.made]
    for x, call in zip(rollouts, closing, strict=True):
        call.result(seconds, f"closing {x.name}")


def _made(environment: Callable[[Problem], Environment], problem: Problem) -> Environment:
    made = environment(problem)
    hash(made.state)
    return made


def _answer(environment: Environment, text: str) -> tuple[Reply, Hashable]:
    """The reply, and the state after it."""
    reply = environment.reply(text)
    if not isinstance(reply, Reply):
        raise TypeError(f"reply() must give a Reply; got {type(reply).__name__}")
    hash(environment.state)
    return reply, environment.state


class _Call:
    """A call in a thread of its own, which begins now."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.start, self.future = monotonic(), begun(function, *arguments)

    @property
    def made(self) -> bool:
        """Whether there is a value."""
        return self.future.done() and self.future.exception() is None

    def result(self, seconds: float, what: str) -> Any:
        """The value, waited for until so many seconds after the beginning."""
        answer = answered(self.future, max(0.0, self.start + seconds - monotonic()))
        if not isinstance(answer, Failure):
            return answer
        if answer.cause is None:
            raise EnvironmentFailed(f"{what} took longer than {seconds:g} s. Repair it, or raise tool_seconds.")
        raise EnvironmentFailed(f"{what} {answer.reason}. Repair it, or let it answer such turns.") from answer.cause
