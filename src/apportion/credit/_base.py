"""Estimators (rollouts to credit), transforms (credit to credit), and the settings that are bound to them."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import reduce, wraps
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    Union,
    cast,
    get_args,
    get_origin,
    overload,
    runtime_checkable,
)

import torch
from torch import Tensor

from apportion.functional import kept
from apportion.types import Cover, Credit, Rollouts, Signal

P = ParamSpec("P")
Settings = Mapping[str, Any]
Requires = tuple[str, ...] | Callable[[Settings], tuple[str, ...]]
Scope = Cover | Callable[[Settings], Cover]
Size = int | Callable[[Settings], int]
Laws = tuple[str, ...] | Callable[[Settings], tuple[str, ...]]
COVERS: tuple[Cover, ...] = ("row", "group", "batch")


@dataclass(frozen=True)
class Estimator:
    """A credit function with its settings bound: call it on rollouts. Equal when it would compute the same.

    Args:
        name: the function that makes the credit (a composition has the name of its first part).
        key: the expression with every setting written out; two estimators with the same key are equal.
        expression: the expression as it was written, what `repr` shows.
        run: the computation with its checks, in float64 and without rounding.
        requires: what the rollouts must have: "signals.outcome", "spans.step", "spans.turn.state", "values", "tokens" ...
        scope: what a correct answer must see: one row, its whole group, the whole batch.
        needs_group_of: the smallest group size that can carry a signal.
        laws: which optional laws hold: "shift" (adding a constant to every outcome changes nothing), "additive" (it
            adds one constant to every advantage), "equal" (equal outcomes give exactly 0 if nothing else was measured),
            "linear" (outcomes times c > 0, nothing else measured: advantages times c), "scale" (they stay as they are,
            up to eps).
    """

    name: str = field(compare=False)
    key: str = field(repr=False)
    expression: str = field(compare=False)
    run: Callable[[Rollouts], Credit] = field(compare=False)
    requires: tuple[str, ...] = field(compare=False)
    scope: Cover = field(compare=False)
    needs_group_of: int = field(compare=False)
    laws: tuple[str, ...] = field(compare=False)

    def __call__(self, rollouts: Rollouts) -> Credit:
        """The credit of these rollouts, rounded once: float64 if every float that was read is, else float32.

        Credit is a constant of the loss: no gradient flows through it.
        """
        dtype = _output_dtype(rollouts, self.requires)
        with torch.no_grad(), _spreading(dtype):
            return _rounded(self.run(rollouts), dtype)

    def exact(self, rollouts: Rollouts) -> Credit:
        """The credit in float64, for compositions, which round when they are done."""
        with _spreading(torch.float64):
            return self.run(rollouts)

    def __repr__(self) -> str:
        return self.expression


@dataclass(frozen=True)
class Transform:
    """A change of credit with its settings bound, to be used in `chain`; fields as in `Estimator`.

    Args:
        laws_after: from the laws of the credit given to those of the credit returned.
    """

    name: str = field(compare=False)
    key: str = field(repr=False)
    expression: str = field(compare=False)
    run: Callable[[Credit, Rollouts], Credit] = field(compare=False)
    requires: tuple[str, ...] = field(compare=False)
    scope: Cover = field(compare=False)
    needs_group_of: int = field(compare=False)
    laws_after: Callable[[tuple[str, ...]], tuple[str, ...]] = field(compare=False)

    def __call__(self, credit: Credit, rollouts: Rollouts) -> Credit:
        """The changed credit, in the dtype of the credit given, without gradient."""
        with torch.no_grad():
            return _rounded(self.run(credit, rollouts), credit.advantages.dtype)

    def __repr__(self) -> str:
        return self.expression


@runtime_checkable
class EstimatorFunction(Protocol[P]):
    """A decorated credit function: with rollouts it runs, without it binds its settings."""

    __name__: str
    role: Literal["estimator", "alias"]

    if TYPE_CHECKING:

        def __getattr__(self, dialect: str) -> "EstimatorFunction[...]": ...

    @overload
    def __call__(self, rollouts: Rollouts, /, *args: P.args, **kwargs: P.kwargs) -> Credit: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Estimator: ...


@runtime_checkable
class TransformFunction(Protocol[P]):
    """A decorated change of credit: with credit and rollouts it runs, without it binds its settings."""

    __name__: str
    role: Literal["transform"]

    @overload
    def __call__(self, credit: Credit, rollouts: Rollouts, /, *args: P.args, **kwargs: P.kwargs) -> Credit: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Transform: ...


def estimator(
    *, requires: Requires = (), scope: Scope = "row", needs_group_of: Size = 1, laws: Laws = ()
) -> Callable[[Callable[Concatenate[Rollouts, P], Credit]], EstimatorFunction[P]]:
    """Make an estimator of `f(rollouts, *, settings) -> Credit`.

    `requires` may name settings, as in "signals.{reward}"; each argument may be a function of the bound settings.
    The function computes in float64 (see `assemble`); calling the estimator rounds once at the end.

    Example:
        >>> @estimator(requires=("signals.outcome",), laws=())
        ... def raw_outcome(rollouts: Rollouts, *, weight: float = 1.0) -> Credit:
        ...     reward = rollouts.signals["outcome"].values.double()
        ...     return assemble(rollouts, rollouts.action_mask, {"outcome": Signal(weight * reward, "trajectory")})
        >>> raw_outcome(weight=2.0)
        raw_outcome(weight=2.0)
        >>> raw_outcome(Rollouts.from_lists([[7, 8]], [0], outcome=[1.0])).advantages
        tensor([[1., 1.]])
    """

    def decorate(function: Callable[Concatenate[Rollouts, P], Credit]) -> EstimatorFunction[P]:
        allowed = _settings_of(function, skip=1)

        @wraps(function)
        def bind_or_run(*given: Any, **settings: Any) -> Any:
            name, bound = function.__name__, _bound(function.__name__, allowed, settings)
            needs, sees = _required(_of(requires, bound), bound), _of(scope, bound)

            def run(rollouts: Rollouts) -> Credit:
                check(rollouts, name, needs, sees)
                return function(rollouts, **bound)  # type: ignore[call-arg]

            size, kept = _of(needs_group_of, bound), _of(laws, bound)
            made = Estimator(name, _call(name, bound), _call(name, settings), run, needs, sees, size, kept)
            return _run_or_return(made, given, (Rollouts,))

        return cast(EstimatorFunction[P], _marked(bind_or_run, "estimator"))

    return decorate


def transform(
    *,
    requires: Requires = (),
    scope: Scope = "row",
    needs_group_of: Size = 1,
    laws: Callable[[Settings, tuple[str, ...]], tuple[str, ...]] | None = None,
) -> Callable[[Callable[Concatenate[Credit, Rollouts, P], Credit]], TransformFunction[P]]:
    """Make a transform of `f(credit, rollouts, *, settings) -> Credit`; arguments as in `estimator`.

    `laws(settings, before)` tells the laws that hold after it; by default all of those before but "additive".
    """

    def decorate(function: Callable[Concatenate[Credit, Rollouts, P], Credit]) -> TransformFunction[P]:
        allowed = _settings_of(function, skip=2)

        @wraps(function)
        def bind_or_run(*given: Any, **settings: Any) -> Any:
            name, bound = function.__name__, _bound(function.__name__, allowed, settings)
            needs, sees = _required(_of(requires, bound), bound), _of(scope, bound)

            def run(credit: Credit, rollouts: Rollouts) -> Credit:
                check(rollouts, name, needs, sees)
                return function(credit, rollouts, **bound)  # type: ignore[call-arg]

            def kept(before: tuple[str, ...]) -> tuple[str, ...]:
                return _without_additive(before) if laws is None else laws(bound, before)

            size = _of(needs_group_of, bound)
            made = Transform(name, _call(name, bound), _call(name, settings), run, needs, sees, size, kept)
            return _run_or_return(made, given, (Credit, Rollouts))

        return cast(TransformFunction[P], _marked(bind_or_run, "transform"))

    return decorate


def alias(function: Callable[P, Estimator]) -> EstimatorFunction[P]:
    """Make a named composition of `f(*, settings) -> Estimator`: with rollouts it runs, without it composes."""
    allowed = _settings_of(function, skip=0)

    @wraps(function)
    def compose_or_run(*given: Any, **settings: Any) -> Any:
        bound = _bound(function.__name__, allowed, settings)
        return _run_or_return(function(**bound), given, (Rollouts,))  # type: ignore[call-arg]

    return cast(EstimatorFunction[P], _marked(compose_or_run, "alias"))


def dialect(of: Any, *, name: str = "") -> Callable[[Callable[P, Estimator]], Callable[P, Estimator]]:
    """Make a named variant `of.name()` of an estimator: the settings with which it gives a peer's own numbers.

    `f(*, settings) -> Estimator`; the variant prints as the settings it stands for. On the command line and in a
    composition it is written `group_relative.trl()`; it is no method of its own, so the function comes back undecorated.
    """

    def decorate(function: Callable[P, Estimator]) -> Callable[P, Estimator]:
        setattr(of, name or function.__name__, alias(function))
        return function

    return decorate


# The dtype in which `assemble` spreads the sum of the parts: the last one at once, where nothing is computed from it.
_SPREAD: ContextVar[torch.dtype] = ContextVar("dtype of assembled advantages", default=torch.float64)


@contextmanager
def _spreading(dtype: torch.dtype) -> Iterator[None]:
    before = _SPREAD.set(dtype)
    try:
        yield
    finally:
        _SPREAD.reset(before)


# ---- what estimators share ----------------------------------------------------------------------------------------


def assemble(
    rollouts: Rollouts,
    mask: Tensor,
    parts: Mapping[str, Signal],
    *,
    returns: Tensor | None = None,
    notes: Mapping[str, float] | None = None,
) -> Credit:
    """Credit whose advantage is the sum of its parts at each position of the mask, and 0 elsewhere."""
    of_unit: dict[str, Tensor] = {}
    for part in parts.values():  # parts of one unit are added before they are spread over positions
        of_unit[part.unit] = of_unit[part.unit] + part.values if part.unit in of_unit else part.values.double()
    spread = [rollouts.at_tokens(Signal(values, unit)) for unit, values in of_unit.items()]
    by_row = [x[:, :1] for x in spread if x.stride(1) == 0]  # one value a row
    wide = [x for x in spread if x.stride(1) != 0]
    if by_row:
        wide.append(reduce(torch.add, by_row))
    return Credit(kept(reduce(torch.add, wide).to(_SPREAD.get()), mask), mask, parts, returns, notes or {})


def measured_mask(rollouts: Rollouts, measured: Tensor) -> Tensor:
    """`action_mask` without the trajectories whose required outcome was not measured."""
    if bool(measured.all()):
        return rollouts.action_mask
    mask = rollouts.action_mask.clone()
    mask[~measured[rollouts.trajectory_ids]] = False
    return mask


def trajectory_values(rollouts: Rollouts, name: str, needed_by: str) -> Tensor:
    """The values [N] of a trajectory signal, in float64.

    Raises:
        ValueError: the signal has another unit or more axes.
    """
    signal = rollouts.signals[name]
    if signal.unit != "trajectory" or signal.values.dim() != 1:
        raise ValueError(
            f"{needed_by} needs signals[{name!r}] with one value per trajectory; got unit {signal.unit!r} and shape "
            f"{list(signal.values.shape)}. Aggregate it first, or name another signal."
        )
    return signal.values.double()


def span_values(rollouts: Rollouts, name: str, spans: str, axes: int, needed_by: str) -> Tensor:
    """The values [S] of a signal over the named spans ([S, K] when `axes` is 1), in float64.

    Raises:
        ValueError: the signal has another unit or another number of axes.
    """
    signal = rollouts.signals[name]
    if signal.unit != spans or signal.values.dim() != 1 + axes:
        shape = "[S, critiques]" if axes else "[S]"
        raise ValueError(
            f"{needed_by} needs signals[{name!r}] with shape {shape} over spans[{spans!r}]; got unit {signal.unit!r} "
            f"and shape {list(signal.values.shape)}. Measure it over these spans, or name others."
        )
    return signal.values.double()


def token_values(rollouts: Rollouts, name: str, needed_by: str) -> Tensor:
    """The values [B, T] of a token signal, in the dtype they were measured in.

    Raises:
        ValueError: the signal has another unit or more axes.
    """
    signal = rollouts.signals[name]
    if signal.unit != "token" or signal.values.dim() != 2:
        raise ValueError(
            f"{needed_by} needs signals[{name!r}] with one number per token; got unit {signal.unit!r} and shape "
            f"{list(signal.values.shape)}. Measure it at tokens, or name another signal."
        )
    return signal.values


# ---- checks ---------------------------------------------------------------------------------------------------------

_CURES = {
    "values": "Train with a critic, or use group_relative.",
    "ref_logprobs": "Keep a reference model, or set kl_coef=0.0.",
    "logprobs": "Record the log-probabilities of what was sampled.",
    "truncated": "Say which responses the length limit cut: Rollouts(truncated=...).",
    "tokens": "Give token ids; continuous actions have no prefixes to compare.",
    "spans": "Split the responses first: rollouts.with_spans({name}=...).",
    "signals": "Measure it first: rollouts.with_signals({name}=...).",
    "state": "Say which spans begin in the same situation: Spans(state=...).",
    "parent": "Say which span each span continues: Spans(parent=...), -1 for a root.",
}


def held(rollouts: Rollouts, needed: str) -> Any:
    """What `needed` names ("values", "signals.outcome", "spans.turn", "spans.turn.state"); None if it is not there."""
    kind, *path = needed.split(".")
    found = getattr(rollouts, kind)
    if path and found is not None:
        found = found.get(path[0])
    return getattr(found, path[1]) if found is not None and len(path) > 1 else found


def check(rollouts: Rollouts, name: str, requires: Sequence[str], scope: Cover) -> None:
    """Refuse rollouts that lack a field, or that show less of the batch than the method must see.

    Raises:
        ValueError: what is needed, what was got, and the cure.
    """
    for needed in requires:
        if held(rollouts, needed) is not None:
            continue
        kind, key, column = (*needed.split("."), "", "")[:3]
        known = getattr(rollouts, kind) if key else None
        has = f" (it has {', '.join(known)})" if known else ""
        field_name = f'rollouts.{kind}["{key}"]' if key else f"rollouts.{kind}"
        field_name, cure = (f"{field_name}.{column}", _CURES[column]) if column else (field_name, _CURES[kind])
        raise ValueError(f"{name} needs {field_name}, which this batch lacks{has}. {cure.format(name=key)}")
    if COVERS.index(rollouts.covers) < COVERS.index(scope):
        raise ValueError(
            f"{name} compares within the {scope}, but this slice covers only the {rollouts.covers}. "
            f"Compute the credit before slicing, or give whole {'groups' if scope == 'group' else 'batches'}."
        )


def nearest(wrong: str, right: Sequence[str]) -> str:
    """` Did you mean ...?`, or the whole list when nothing is near."""
    close = get_close_matches(wrong, right, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(map(repr, right))}."


# ---- binding settings -----------------------------------------------------------------------------------------------


def _settings_of(function: Callable[..., Any], skip: int) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(function, eval_str=True).parameters.items())[skip:])


def _bound(name: str, allowed: Mapping[str, inspect.Parameter], given: Settings) -> dict[str, Any]:
    """Every setting of the function, given or default, checked."""
    for key in given:
        if key not in allowed:
            hint = nearest(key, list(allowed)) if allowed else "It takes none."
            raise TypeError(f"{name} has no setting {key!r}. {hint}")
    missing = [k for k, p in allowed.items() if p.default is inspect.Parameter.empty and k not in given]
    if missing:
        raise TypeError(f"{name} needs the setting {missing[0]!r}, which has no default.")
    return {k: _checked(name, k, given.get(k, p.default), p.annotation) for k, p in allowed.items()}


def _checked(name: str, key: str, value: Any, annotation: Any) -> Any:
    """The value, if the annotation admits it; a whole number becomes a float where a float is meant."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    sequence = next((get_args(m)[0] for m in members if get_origin(m) is tuple), None)
    if sequence is not None and isinstance(value, tuple | list):
        return tuple(_checked(name, key, item, sequence) for item in value)
    members = tuple(m for m in members if get_origin(m) is not tuple)
    choices = [v for m in members for v in ((None,) if m is NoneType else get_args(m))]
    kinds = tuple(m for m in members if isinstance(m, type) and m is not NoneType)
    if type(value) is int and float in kinds:
        value = float(value)
    if not (isinstance(value, kinds) or value in choices):
        wanted = [k.__name__ for k in kinds] + [repr(c) for c in choices]
        wanted += [] if sequence is None else [f"several {sequence.__name__}"]
        close = get_close_matches(str(value), [c for c in choices if isinstance(c, str)], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        error = TypeError if kinds or sequence is not None else ValueError
        raise error(f"{name} needs {key} to be {' or '.join(wanted)}; got {value!r}.{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} needs a finite {key}; got {value}.")
    return value


def _call(name: str, settings: Settings) -> str:
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def _without_additive(laws: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(law for law in laws if law != "additive")


def _marked(function: Any, role: str) -> Any:
    """Tell lists of methods what kind of function this is."""
    function.role = role
    return function


def _of(value: Any, settings: Settings) -> Any:
    return value(settings) if callable(value) else value


def _required(names: Sequence[str], settings: Settings) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.format(**settings) for name in names))


def _run_or_return(made: Any, given: tuple[Any, ...], kinds: tuple[type, ...]) -> Any:
    if not given:
        return made
    if len(given) != len(kinds) or not all(map(isinstance, given, kinds)):
        want = ", ".join(k.__name__ for k in kinds)
        got = ", ".join(type(g).__name__ for g in given)
        raise TypeError(f"{made.name} takes {want} or nothing, then settings by name; got {got}.")
    return made(*given)


# ---- rounding -------------------------------------------------------------------------------------------------------


def _output_dtype(rollouts: Rollouts, requires: Sequence[str]) -> torch.dtype:
    read: list[Tensor | None] = []
    for needed in requires:
        kind = needed.partition(".")[0]
        found = held(rollouts, needed)
        read.append(found.values if isinstance(found, Signal) else found if isinstance(found, Tensor) else None)
        read += {"values": [rollouts.bootstrap], "logprobs": [rollouts.old_logprobs]}.get(kind, [])
    floats = [x.dtype for x in read if x is not None and x.is_floating_point()]
    return torch.float64 if floats and all(d == torch.float64 for d in floats) else torch.float32


def _rounded(credit: Credit, dtype: torch.dtype) -> Credit:
    return replace(
        credit,
        advantages=credit.advantages.to(dtype),
        returns=None if credit.returns is None else credit.returns.to(dtype),
        parts={k: replace(v, values=v.values.to(dtype)) for k, v in credit.parts.items()},
    )
