"""`--credit TEXT`: a name, a printed composition, or the user's own `module:function`, made into an estimator."""

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from apportion import credit
from apportion.cli._errors import UserError, nearest

COMBINATORS = ("chain", "add", "partition")
_LONGEST = 4000
_DEEPEST = 20
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def parse_credit(text: str) -> credit.Estimator:
    """The estimator that a text names.

    Args:
        text: a name (`capo`), a composition as it is printed (`chain(signed_outcome(), clip(limit=2.0))`), or
            `module:function`: an estimator, a function without arguments that returns one, or a plain function from
            rollouts to credit. Of a composition nothing is evaluated but exported names of apportion.credit and
            literals.

    Raises:
        UserError: the text names nothing; the nearest right name is suggested.
    """
    text = text.strip()
    if _OWN.fullmatch(text):
        return _own(text)
    made = _evaluated(text)
    if not isinstance(made, credit.Estimator):
        kind = "a transform: it changes credit that an estimator made" if _is_transform(made) else "not an estimator"
        raise UserError(f"--credit {text} is {kind}. Write chain(grpo(), ...), or see: apportion methods")
    return made


def exported() -> dict[str, Callable[..., Any]]:
    """The functions of apportion.credit that a composition may call: estimators, transforms and combinators."""
    functions = {name: getattr(credit, name) for name in credit.__all__}
    return {name: f for name, f in functions.items() if name in COMBINATORS or bound(f) is not None}


def kind_of(name: str) -> str:
    """ "estimator", "transform" or "combinator"."""
    if name in COMBINATORS:
        return "combinator"
    return "transform" if _is_transform(bound(getattr(credit, name))) else "estimator"


def short(expression: str) -> str:
    """The exported name (`capo`) whose expanded composition this is; the expression itself if there is none."""
    made = {name: bound(function) for name, function in exported().items() if name not in COMBINATORS}
    names = [name for name, estimator in made.items() if repr(estimator) == expression]
    return min(names, key=len, default=expression)


def _is_transform(x: Any) -> bool:
    return isinstance(x, credit.Transform)


def bound(function: Any) -> Any:
    """The estimator or transform a function of the library gives when it is called with its defaults; else None."""
    if inspect.isclass(function) or not callable(function) or function in _makers():
        return None
    made = function() if _callable_bare(function) else None
    return made if isinstance(made, credit.Estimator | credit.Transform) else None


def _makers() -> tuple[Any, ...]:
    return tuple(getattr(credit, name, None) for name in ("estimator", "transform", "alias", *COMBINATORS))


def _callable_bare(function: Any) -> bool:
    try:
        inspect.signature(function, follow_wrapped=False).bind()
    except (TypeError, ValueError):
        return False
    return True


# ---- compositions -----------------------------------------------------------------------------------------------------


def _evaluated(text: str) -> Any:
    if len(text) > _LONGEST:
        raise UserError(f"--credit is {len(text)} characters long; at most {_LONGEST} are read. Use module:function.")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"--credit {text!r:.200} is not a name or a composition. Example: chain(grpo(), clip())"
        ) from None
    if isinstance(tree, ast.Name):
        tree = ast.Call(tree, [], [])
    return _value(tree, 0)


def _value(node: ast.expr, depth: int) -> Any:
    if depth > _DEEPEST:
        raise UserError(f"--credit is nested more than {_DEEPEST} levels deep. Use module:function.")
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as number)):
            return -number if isinstance(sign, ast.USub) else number
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_value(x, depth + 1) for x in items)
        case ast.Dict(keys=keys, values=values) if all(isinstance(k, ast.Constant) for k in keys):
            return {k.value: _value(v, depth + 1) for k, v in zip(keys, values, strict=True)}  # type: ignore[union-attr]
        case ast.Call():
            return _called(node, depth)
    raise UserError(f"--credit may hold calls of apportion.credit and literals; got {ast.unparse(node)!r:.200}.")


def _called(node: ast.Call, depth: int) -> Any:
    function = _function(node.func)
    if any(isinstance(x, ast.Starred) for x in node.args) or any(k.arg is None for k in node.keywords):
        raise UserError(f"--credit cannot unpack arguments; got {ast.unparse(node)!r:.200}.")
    args = [_value(x, depth + 1) for x in node.args]
    settings = {str(k.arg): _value(k.value, depth + 1) for k in node.keywords}
    try:
        return function(*args, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--credit {ast.unparse(node):.200}: {error}") from error


def _function(node: ast.expr) -> Callable[..., Any]:
    """An exported function, or a named variant of one, as in `group_relative.trl()`."""
    known = exported()
    match node:
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Name(id=name):
            raise UserError(f"there is no credit method {name!r}. {nearest(name, known)} See: apportion methods")
        case ast.Attribute(value=ast.Name(id=name), attr=variant) if name in known:
            own = dialects_of(known[name])
            if variant in own:
                return own[variant]
            hint = nearest(variant, own) if own else "It has none."
            raise UserError(f"{name} has no variant {variant!r}. {hint}")
    raise UserError(f"--credit may call exported names of apportion.credit only; got {ast.unparse(node)!r:.200}.")


def dialects_of(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The dialects of a function by name."""
    own = vars(function) if hasattr(function, "__dict__") else {}
    return {name: f for name, f in own.items() if not name.startswith("_") and bound(f) is not None}


# ---- the user's own ---------------------------------------------------------------------------------------------------


def _own(text: str) -> credit.Estimator:
    module_name, _, attribute = text.partition(":")
    found = imported(module_name, attribute)
    if inspect.isclass(found) or (not isinstance(found, credit.Estimator) and _callable_bare(found)):
        found = found()
    if isinstance(found, credit.Estimator):
        return replace(found, expression=text)  # what is printed can be typed back
    if not callable(found) or _is_transform(found):
        raise UserError(
            f"--credit {text} is a {type(found).__name__}. Give an estimator, a function that returns one, "
            "or a function from Rollouts to Credit."
        )
    return credit.Estimator(
        name=text, key=text, expression=text, run=found, requires=(), scope="batch", needs_group_of=1, laws=()
    )


def own(option: str, text: str) -> Any:
    """What the user's own `module:attribute` names.

    Raises:
        UserError: the text has another form, or names nothing.
    """
    if not _OWN.fullmatch(text):
        raise UserError(f"{option} {text!r:.200} is not module:function. Example: {option} my_module:my_function")
    module_name, _, attribute = text.partition(":")
    return imported(module_name, attribute, option)


def imported(module_name: str, attribute: str, option: str = "--credit") -> Any:
    """What `module:attribute` names; modules of the working directory are found."""
    _look_here()
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise UserError(f"{option}: there is no module {module_name!r} here or on PYTHONPATH.") from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UserError(f"{option}: {module_name} has no {attribute!r}. {nearest(name, _public(found))}")
        found = getattr(found, name)
    return found


def parse_task(text: str) -> Any:
    """The task that a text names; modules of the working directory are found, as in `keep='my_module:my_function'`."""
    from apportion.tasks import resolve_task

    _look_here()
    return resolve_task(text)


def _look_here() -> None:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _public(module: Any) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]
