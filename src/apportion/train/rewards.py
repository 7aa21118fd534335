"""Rewards of whole responses: any number of functions, each with a weight, a limit of time and a signal of its own."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from apportion.signals import TOKEN_STATISTICS
from apportion.tasks import Problem
from apportion.train.asking import Failure, NamedFunction, ask, ask_here, is_async, name_of, named, shown
from apportion.train.learner import NotFinite
from apportion.types import Rollouts, Signal

if TYPE_CHECKING:
    from apportion.train.config import Config

VERIFIER = "verifier"
TAKEN = {
    "outcome",
    "score",
    VERIFIER,
    "judge",
    "turn_reward",
    "environment",
    "kl_coef",
    "fai",
    "waad",
    *TOKEN_STATISTICS,
}
"""Signals of the trainer itself."""
_FOREIGN = {"completions": "trl_reward", "solution_str": "verl_reward", "queries": "openrlhf_reward"}
_EXCERPT = 60
_WHOLE = ("score_rollouts", "score")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Reward:
    """A reward of whole responses: a function, its weight in the outcome, and the name of its signal.

    The text is what the policy wrote; of several turns, one after the other with a line break between, without the answers.

    What a function returns for a response is its reward; None = it does not apply there and adds nothing; NaN = it could not
    be measured. The rewards of a batch are a list of those, in which an exception stands for a response that failed.

    Args:
        function: one of these.
            `f(problem, text)`: called in a thread, for one response after another.
            The same, async: called for all responses together.
            Text, `module:function`: if it is a plain function it runs in a process, which is killed when it hangs.
            An object with `score(problems, texts)` or `score_rollouts(problems, rollouts)`, plain or async: all rewards
            of a batch at once. Such are `RewardModel`, `trl_reward` and `overlong`.
        weight: factor in the outcome; below 0 for a penalty, 0 to log it only.
        name: of its signal; empty = the function's own.

    Raises:
        ValueError: no usable name or weight, or a function with other arguments. TypeError: nothing that can be called.
    """

    function: Any
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        given = named(self.function) if isinstance(self.function, str) else self.function
        object.__setattr__(self, "function", given)
        object.__setattr__(self, "name", self.name or name_of(given))
        _check(self)

    def __repr__(self) -> str:
        return f"Reward({shown(self.function)}, weight={self.weight:g}, name={self.name!r})"


class RewardFailed(NotFinite):
    """A reward raised, hung or gave no number. `rows` are the rollouts; the exception of the function is the cause."""


def failed(what: str, rows: Sequence[int], problem: str, text: str) -> RewardFailed:
    """The error that names the first of the rows, its problem, and both ends of its text."""
    short = text if len(text) <= 2 * _EXCERPT else f"{text[:_EXCERPT]} ... {text[-_EXCERPT:]}"
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return RewardFailed(f"{what}, on row {rows[0]}{more}, problem {problem}, text {short!r}", rows)


def rewarded(rollouts: Rollouts, problems: Sequence[Problem], config: "Config", *, may_miss: bool) -> Rollouts:
    """The outcome of every response, as the signal "outcome", and each reward that makes it as a signal of its own.

    `outcome = task_weight * verifier + sum_k weight_k * reward_k` over the rewards that apply to the response. Where the
    verifier says nothing (NaN), what the environment paid in all stands for its word. The two are never added: a game
    whose turns are all the reward has the verifier `tasks.unverified`.

    A response that the limit cut gets `truncated_reward` instead, if that is set; its rewards are still measured, under
    their names, and may be NaN. Without `rewards` the verifier is the only one and has no signal of its own, and is not
    asked about such responses.

    Plain rewards are asked one after another, with the async ones going on beside them.

    Args:
        rollouts: one row per trajectory, with meta["text"].
        problems: one for each row.
        may_miss: a reward that raises, hangs or is NaN makes the outcome NaN, and meta["unmeasured"] says why: for each
            row a list of "name: reason". False: it stops.

    Raises:
        RewardFailed: a reward is infinite; without `may_miss` also one that raised or hung, or is NaN where the outcome
            needs it.
    """
    assert rollouts.truncated is not None
    assert rollouts.batch == rollouts.num_trajectories
    fixed = rollouts.truncated & (config.truncated_reward is not None)
    batch = _Batch(problems, rollouts.meta["text"], fixed.tolist(), may_miss)
    answers = {r.name: _asked(r, rollouts, problems, config.reward_seconds) for r in config.rewards}  # async ones begin
    columns: dict[str, list[float | None]] = {}
    if config.task_weight:
        rows = range(rollouts.batch) if config.rewards else (~fixed).nonzero()[:, 0].tolist()
        columns[VERIFIER] = batch.column(VERIFIER, _verified(rollouts, problems, config, rows), rows)
    for reward in sorted(config.rewards, key=lambda r: is_async(_method(r.function))):
        columns[reward.name] = batch.column(reward.name, answers[reward.name], range(rollouts.batch))
    weights = {VERIFIER: config.task_weight, **{r.name: r.weight for r in config.rewards}}
    outcome = torch.tensor(batch.outcome(columns, weights), device=rollouts.device)
    if config.truncated_reward is not None:
        outcome = torch.where(fixed, config.truncated_reward, outcome)
    parts = {name: _tensor(columns[name], rollouts.device) for name in signal_names(config)}
    signals = {name: Signal(values, "trajectory") for name, values in {**parts, "outcome": outcome}.items()}
    rollouts = rollouts.with_signals(**signals)
    return rollouts.replace(meta={**rollouts.meta, "unmeasured": batch.reasons}) if may_miss else rollouts


def _verified(rollouts: Rollouts, problems: Sequence[Problem], config: "Config", rows: Sequence[int]) -> Iterator[Any]:
    """What the task's verifier says of these rows; where it says nothing, what the environment paid in all."""
    texts = rollouts.meta["text"]
    answers = ask_here(config.task.verify, [(problems[row], texts[row]) for row in rows])
    if "environment" not in rollouts.signals:
        return answers
    paid = rollouts.signals["environment"].values.tolist()
    return (paid[row] if _is_nan(_number(answer)) else answer for row, answer in zip(rows, answers, strict=True))


def signal_names(config: "Config") -> list[str]:
    """The signals that `rewarded` gives beside "outcome"."""
    if not config.rewards:
        return []
    return [VERIFIER] * bool(config.task_weight) + [r.name for r in config.rewards]


def unmeasured_counts(rollouts: Rollouts) -> dict[str, int]:
    """How many responses each reward could not be measured on: {"unmeasured/NAME": count}, without the zeros."""
    reasons = [reason for row in rollouts.meta.get("unmeasured", ()) for reason in row]
    return {f"unmeasured/{name}": n for name, n in sorted(Counter(r.partition(":")[0] for r in reasons).items())}


def check_rewards(config: "Config") -> None:
    """Refuse rewards whose signals clash, or that other options make useless; then start and load what they need.

    Raises:
        ValueError: with the names of what does not fit together.
    """
    taken = TAKEN | {p.removeprefix("signals.") for m in config.measures for p in m.provides}
    for name, count in Counter(r.name for r in config.rewards).items():
        if count > 1 or name in taken:
            what = f"{count} rewards are" if count > 1 else "a reward is"
            why = "each needs a name of its own" if count > 1 else "a signal of that name comes from elsewhere"
            raise ValueError(f"{what} named {name!r}, but {why}. Give another: Reward(..., name='{name}_2').")
    for reward in config.rewards:
        if getattr(reward.function, "of_cut", False) and config.truncated_reward is not None:
            raise ValueError(
                f"the reward {reward.function!r} is a penalty of responses that are too long, but truncated_reward is "
                f"{config.truncated_reward:g}, which replaces the outcome of those that were cut. Set truncated_reward=None."
            )
        getattr(reward.function, "check", lambda: None)()


# ---- asking -----------------------------------------------------------------------------------------------------------


def _method(function: Any) -> Any:
    """What is called: the object's method for a whole batch, or the function itself."""
    return next((getattr(function, name) for name in _WHOLE if hasattr(function, name)), function)


def _asked(reward: Reward, rollouts: Rollouts, problems: Sequence[Problem], seconds: float) -> Iterator[Any]:
    """One answer per row; what is asked for the whole batch gets the time of all its rows."""
    method, texts = _method(reward.function), rollouts.meta["text"]
    if method is reward.function:
        return ask(method, list(zip(problems, texts, strict=True)), seconds)
    given = rollouts if hasattr(reward.function, "score_rollouts") else texts
    return _spread(ask(method, [(problems, given)], seconds * rollouts.batch), rollouts.batch)


def _spread(answers: Iterator[Any], count: int) -> Iterator[Any]:
    """The rewards of a batch, one by one."""
    found = next(answers)
    if not isinstance(found, Failure):
        try:
            found = list(found)
        except TypeError:
            found = Failure(f"gave {found!r:.80} instead of one number per response")
    if isinstance(found, list) and len(found) != count:
        found = Failure(f"gave {len(found)} numbers for {count} responses")
    if isinstance(found, Failure):
        found = [replace(found, reason=f"{found.reason}, asked for all {count} responses at once")] * count
    yield from found


def _is_nan(number: float | Failure | None) -> bool:
    return isinstance(number, float) and math.isnan(number)


def _number(answer: Any) -> float | Failure | None:
    if answer is None or isinstance(answer, Failure):
        return answer
    if isinstance(answer, Exception):
        return Failure(f"failed: {answer}", answer)
    try:
        return float("text" if isinstance(answer, str | bytes) else answer)
    except Exception:
        return Failure(f"gave {answer!r:.80}, which is not a number")


@dataclass
class _Batch:
    """The responses, those whose outcome is `fixed`, and why some rewards of the others could not be measured."""

    problems: Sequence[Problem]
    texts: Sequence[str]
    fixed: Sequence[bool]
    may_miss: bool

    def __post_init__(self) -> None:
        self.reasons: list[list[str]] = [[] for _ in self.problems]

    def column(self, name: str, answers: Iterator[Any], rows: Sequence[int]) -> list[float | None]:
        """One reward of every row, NaN where it was not measured, None where it does not apply or was not asked."""
        out: list[float | None] = [None] * len(self.problems)
        silent: list[int] = []
        for row, answer in zip(rows, answers, strict=True):
            number = _number(answer)
            if isinstance(number, Failure):
                self._miss(f"{name}: {number.reason}", [row], number.cause)
                number = math.nan
            elif number is not None and abs(number) > _LARGEST:
                raise self._failed(f"{name}: is {number:g}", [row])
            elif _is_nan(number) and not self.fixed[row]:
                silent.append(row)
            out[row] = number
        if silent:
            self._miss(f"{name}: is nan, not measured", silent)
        return out

    def outcome(self, columns: dict[str, list[float | None]], weights: dict[str, float]) -> list[float]:
        """The weighted sums; NaN where a reward with a weight was not measured, or none applies."""
        out = []
        for row, is_fixed in enumerate(self.fixed):
            applying = [(weights[k], values[row]) for k, values in columns.items() if weights[k]]
            terms = [w * x for w, x in applying if x is not None]
            if not terms and not is_fixed:
                self._miss("outcome: has no reward that applies", [row])
            out.append(math.fsum(terms) if terms else math.nan)
        return out

    def _miss(self, reason: str, rows: Sequence[int], cause: BaseException | None = None) -> None:
        """Remember it, or stop."""
        if not self.may_miss:
            raise self._failed(reason, rows) from cause
        for row in rows:
            self.reasons[row].append(reason)

    def _failed(self, reason: str, rows: Sequence[int]) -> RewardFailed:
        name, _, what = reason.partition(": ")
        who = name if name == "outcome" else f"reward {name}"
        return failed(f"the {who} {what}", rows, self.problems[rows[0]].id, self.texts[rows[0]])


def _tensor(values: Sequence[float | None], device: torch.device) -> torch.Tensor:
    return torch.tensor([math.nan if x is None else x for x in values], device=device)


# ---- checks -----------------------------------------------------------------------------------------------------------


def _check(reward: Reward) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", reward.name):
        raise ValueError(
            f"a reward needs a name of letters, digits and _ ; {reward.name!r} is none. Give one: Reward(..., name='style')."
        )
    if not math.isfinite(reward.weight):
        raise ValueError(f"the reward {reward.name} needs a finite weight; got {reward.weight}.")
    function = reward.function
    if isinstance(function, NamedFunction):
        function = function.imported()
    if _method(function) is not function:
        return
    if not callable(function):
        raise TypeError(
            f"a reward is a function or an object with score(problems, texts); got a {type(function).__name__}."
        )
    _check_arguments(reward.name, function)


def _check_arguments(name: str, function: Any) -> None:
    """A function of two arguments; to one that was written for another trainer its adapter is named."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function of C does not say
        return
    adapter = next((_FOREIGN[p] for p in signature.parameters if p in _FOREIGN), None)
    if adapter is not None:
        raise ValueError(
            f"the reward {name}{signature} is written for another trainer. Wrap it: {adapter}({name}); on the command line "
            f"{adapter.removesuffix('_reward')}:module:function."
        )
    try:
        signature.bind(None, None)
    except TypeError:
        raise ValueError(f"a reward is called as f(problem, text), but {name} takes {signature}.") from None
