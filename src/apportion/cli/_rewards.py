"""`--rewards TEXT`: a reward function with its weight and name, made into a `Reward`."""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from apportion.cli._compose import own
from apportion.cli._errors import UserError, nearest

_FORM = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\*)?(?P<what>.+)", re.DOTALL
)
_EXAMPLE = "Write module:function, 0.5*module:function, overlong(limit=200, buffer=50) or model:FOLDER."


def parse_reward(text: str) -> Any:
    """The reward that a text names: `[NAME=][WEIGHT*]WHAT`.

    Args:
        text: WHAT is one of these.
            `module:function`, a function `f(problem, text)`: a plain one runs in a process, an async one in an event loop.
            `trl:module:function`, and `verl:` or `openrlhf:`: a function as that trainer calls it.
            `model:FOLDER`, a reward model.
            `matches('REGEX')`, `overlong(limit=..., buffer=...)`, `repetition(n=...)`, `of_signal('...')`.

    Raises:
        UserError: the text names nothing of these.
    """
    form = _FORM.fullmatch(text.strip())
    if form is None:
        raise UserError(f"--rewards has an empty entry. {_EXAMPLE}")
    weight, what = float(form["weight"] or 1.0), form["what"].strip()
    try:
        return _reward(what, weight, form["name"] or "")
    except (ValueError, TypeError) as error:
        raise UserError(f"--rewards {text!r:.200}: {error}") from error


def _reward(what: str, weight: float, name: str) -> Any:
    from apportion.train import Reward, RewardModel, openrlhf_reward, trl_reward, verl_reward

    adapters: dict[str, Callable[..., Any]] = {"trl": trl_reward, "verl": verl_reward, "openrlhf": openrlhf_reward}
    kind, _, rest = what.partition(":")
    if kind == "model" and rest:
        return Reward(RewardModel(rest), weight, name)
    if kind in adapters and ":" in rest:
        return Reward(adapters[kind](own("--rewards", rest)), weight, name)
    if re.fullmatch(r"\w+\s*\(.*\)", what, re.DOTALL):
        return Reward(_built_in(what), weight, name)
    if ":" not in what:
        raise UserError(f"--rewards {what!r:.200} names no reward. {_EXAMPLE}")
    found = own("--rewards", what)
    if isinstance(found, Reward):
        return replace(found, weight=weight * found.weight, name=name or found.name)
    return Reward(what, weight, name)


def _built_in(text: str) -> Any:
    """A call of one of the library's reward functions with literals; nothing is evaluated."""
    from apportion import signals

    makers = {name: getattr(signals, name) for name in ("matches", "of_signal", "overlong", "repetition")}
    problem = f"--rewards {text!r:.200} is not a call with literals. {_EXAMPLE}"
    try:
        call = ast.parse(text, mode="eval").body
        if (
            not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Name)
            or any(k.arg is None for k in call.keywords)
        ):
            raise UserError(problem)
        name = call.func.id
        given = [ast.literal_eval(x) for x in call.args], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(problem) from None
    if name not in makers:
        raise UserError(f"there is no reward {name!r}. {nearest(name, makers)}")
    try:
        inspect.signature(makers[name]).bind(*given[0], **given[1])
    except TypeError as error:
        raise UserError(f"--rewards {text}: {error}. It is {name}{inspect.signature(makers[name])}.") from None
    return makers[name](*given[0], **given[1])
