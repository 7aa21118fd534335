"""The function that `FactorFunction` calls in a process of its own: runs code that a language model wrote.

It imports nothing of this package. The process has limits on time, memory and output; here the code also loses imports,
private names, files and sockets. That is a fence, not a proof: give it no secrets, and no more rights than it needs.
"""

import ast
import builtins
import math
import resource
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

_BUILTINS = (
    "abs all any bool dict enumerate filter float int isinstance len list map max min pow range reversed round set sorted "
    "str sum tuple zip True False None Exception ValueError TypeError ZeroDivisionError"
)
_NUMPY = (
    "abs absolute add all any arange arccos arctan arctan2 argmax argmin array asarray bool_ ceil clip column_stack "
    "concatenate cos cosh cross cumprod cumsum deg2rad diff divide dot e exp expand_dims expm1 fabs float32 float64 floor "
    "full full_like hypot inf int64 isclose isfinite isnan linspace log log10 log1p log2 logical_and logical_not "
    "logical_or matmul max maximum mean median min minimum mod multiply nan nan_to_num ndarray newaxis ones ones_like "
    "percentile pi power prod quantile rad2deg reshape round sign sin sinh sort split sqrt square squeeze stack std "
    "subtract sum take tan tanh tile transpose var vstack hstack where zeros zeros_like"
)
_FORBIDDEN = ("_", "f_", "gi_", "cr_", "ag_", "tb_", "co_", "func_")
_WRITES = {"tofile", "dump", "dumps", "ctypes", "format", "format_map", "mro", "setflags"}
_MODULES = {
    "math": SimpleNamespace(**{k: v for k, v in vars(math).items() if not k.startswith("_")}),
    "numpy": SimpleNamespace(
        **{k: getattr(np, k) for k in _NUMPY.split()}, linalg=SimpleNamespace(norm=np.linalg.norm, det=np.linalg.det)
    ),
}


def factors(source: str, states: Any, actions: Any) -> list[list[float]]:
    """The factors of each state and action, [M][D], from the `factors(states, actions)` that the source defines.

    Raises:
        ValueError, or whatever the code raises: the text tells its author what is wrong.
    """
    function = _compiled(source)
    _close_the_doors()
    with np.errstate(all="ignore"):
        found = function(np.array(states, dtype=np.float64), np.array(actions, dtype=np.float64))
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"factors must return a list of arrays, one per factor; got {type(found).__name__}")
    columns = [_column(x, number, len(states)) for number, x in enumerate(found)]
    return np.concatenate(columns, axis=1).tolist()  # type: ignore[no-any-return]


def _column(x: Any, number: int, batch: int) -> Any:
    """A factor as an array of shape (batch, 1), checked."""
    if not isinstance(x, np.ndarray) or x.shape != (batch, 1):
        got = f"an array of shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"factor {number} must be an array of shape (batch, 1) = ({batch}, 1); got {got}")
    column = x.astype(np.float64)
    if not np.isfinite(column).all():
        raise ValueError(f"factor {number} is NaN or infinite for some states")
    return column


def _compiled(source: str) -> Any:
    """The function `factors` of the source, which is refused if it reaches for anything private."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None) or ""
        hidden = name.startswith(_FORBIDDEN) if isinstance(node, ast.Attribute) else name.startswith("__")
        if hidden or (isinstance(node, ast.Attribute) and name in _WRITES):
            raise ValueError(f"factors may not use {name!r}")
        if isinstance(node, ast.MatchClass):  # reads attributes by name
            raise ValueError("factors may not match classes")
    scope: dict[str, Any] = {
        "__builtins__": {**{k: getattr(builtins, k) for k in _BUILTINS.split()}, "__import__": _import},
        "np": _MODULES["numpy"],
        "math": _MODULES["math"],
    }
    exec(compile(tree, "factors", "exec"), scope)
    if not callable(scope.get("factors")):
        raise ValueError("the code must define a function factors(states, actions)")
    return scope["factors"]


def _import(name: str, *_: Any) -> Any:
    """Only what is already there; numpy's own code asks for its inner modules through here, and ignores what it gets."""
    if name.partition(".")[0] not in _MODULES or name not in sys.modules:
        raise ImportError(f"factors may import numpy and math only; got {name!r}")
    return _MODULES[name.partition(".")[0]]


def _close_the_doors() -> None:
    """No new file, socket or process from here on; what is open stays open."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
