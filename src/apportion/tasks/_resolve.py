"""From what a person types to a task: exported names and literals only, never evaluated."""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from apportion.tasks._arithmetic import arithmetic
from apportion.tasks._calculator import calculator
from apportion.tasks._core import Task
from apportion.tasks._data import from_data
from apportion.tasks._names import imported, is_own, nearest
from apportion.tasks._reasoning_gym import reasoning_gym_task
from apportion.tasks._words import gsm8k, mawps, svamp, word_problems


@dataclass(frozen=True)
class TaskInfo:
    """A row of `apportion tasks`."""

    name: str
    what: str
    needs: str
    example: str


_TASKS: Mapping[str, tuple[Callable[..., Task], TaskInfo]] = MappingProxyType(
    {
        name: (make, TaskInfo(name, str(inspect.getdoc(make)).split("\n")[0], needs, example))
        for name, make, needs, example in (
            ("arithmetic", arithmetic, "nothing", "arithmetic(terms=4, digits=1)"),
            ("calculator", calculator, "nothing", "calculator(terms=3, digits=3)"),
            (
                "from_data",
                from_data,
                "a path, or the package datasets",
                "from_data('train.jsonl', test='test.jsonl', prompt='question', answer='answer')",
            ),
            ("gsm8k", gsm8k, "a path, or the package datasets and the network", "gsm8k(path='data/gsm8k')"),
            ("mawps", mawps, "a path", "mawps(path='data/mawps/addsub.jsonl')"),
            ("reasoning_gym", reasoning_gym_task, "the package reasoning-gym", "reasoning_gym(chain_sum, max_terms=3)"),
            ("svamp", svamp, "a path, or the package datasets and the network", "svamp(path='data/svamp/test.jsonl')"),
            ("word_problems", word_problems, "a path", "word_problems('train.jsonl', test='test.jsonl')"),
        )
    }
)


def available() -> list[TaskInfo]:
    """Every task that can be named, sorted by name."""
    return [info for _, info in _TASKS.values()]


def resolve_task(text: str) -> Task:
    """The task that a text names: `arithmetic`, `arithmetic(terms=5)`, `reasoning_gym(chain_sum)`, `my_module:my_task`.

    A call is read, not evaluated: an exported name, and literals or bare words as arguments. `module:name` is imported;
    it is a task, or a function without arguments that returns one.

    Raises:
        ValueError: an unknown name or argument (answered with the nearest known one), a wrong one, or text of another form.
    """
    if is_own(text):
        return _own(text)
    name, positional, named = _parsed(text)
    if name not in _TASKS:
        raise ValueError(f"there is no task {name!r}.{_hint(name)}")
    make = _TASKS[name][0]
    _check_arguments(name, make, positional, named)
    try:
        return make(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"{text}: an argument has a wrong type: {error}. For example {_TASKS[name][1].example}."
        ) from error


def _parsed(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    problem = (
        f"a task is written as a name, a call with literals or module:function; got {text!r}. Try arithmetic(terms=4)."
    )
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, [], {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError(problem)
        if any(k.arg is None for k in node.keywords):
            raise ValueError(problem)
        return node.func.id, [_value(a) for a in node.args], {str(k.arg): _value(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(problem) from None


def _value(node: ast.expr) -> Any:
    """A literal; a bare word is itself."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _check_arguments(name: str, make: Callable[..., Task], positional: list[Any], named: Mapping[str, Any]) -> None:
    signature = inspect.signature(make)
    kinds = [p.kind for p in signature.parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for argument in named:
            if argument not in signature.parameters:
                raise ValueError(f"{name} has no argument {argument!r}.{nearest(argument, signature.parameters)}")
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"{name}: {error}. For example {_TASKS[name][1].example}.") from None


def _hint(name: str) -> str:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return nearest(name, _TASKS)
    return f" Did you mean 'reasoning_gym({name})'?" if name in DATASETS else nearest(name, _TASKS)


def _own(text: str) -> Task:
    found = imported(text, "task")
    made = found if isinstance(found, Task) or not callable(found) else found()
    if not isinstance(made, Task):
        raise ValueError(f"{text.strip()} gave a {type(made).__name__}. A task has name, train, test and verify.")
    return made
