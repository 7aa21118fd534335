"""What every command shares: parsing by tyro, the help text from the docstring, printing JSON."""

import inspect
import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import tyro

from apportion.cli._errors import UserError

_PIPE_WIDTH = 160
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
OptionalNumber = Annotated[int | None, tyro.conf.arg(metavar="N")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


def call(command: Callable[..., int], argv: Sequence[str], name: str | None = None) -> int:
    """Parse `argv` for a command and run it. The help is its docstring, up to "Args:"; `name`, if it is not its own."""

    @wraps(command)
    def later(*args: Any, **options: Any) -> Callable[[], int]:
        return partial(command, *args, **options)

    return call_with(later, argv, name or command.__name__, lambda parsed: parsed())


def call_with(shape: Callable[..., Any], argv: Sequence[str], name: str, run: Callable[[Any], int]) -> int:
    """Parse `argv` into `shape` (a function or a dataclass) and run with what it made."""
    about = inspect.cleandoc(shape.__doc__ or "").partition("\nArgs:")[0].rstrip()
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            parsed = tyro.cli(
                shape,
                prog=f"apportion {name}",
                description=about,
                args=list(argv),
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as leaving:
        if not leaving.code:
            return 0
        raise UserError(_unboxed(complaint.getvalue(), name)) from None
    return run(parsed)


def _unboxed(text: str, name: str) -> str:
    """The message that was drawn in a box, without its repetition of the help text, which is indented by nine."""
    lines = [line.strip("╭╮╰╯│─") for line in text.splitlines()]
    said = [line.strip("─ ") for line in lines[1:] if not line.startswith(" " * 9)]
    message = " ".join(line for line in said if line.strip("-"))  # a rule is dashes where there is no Unicode
    for repetition in ("Got errors:", "Argument helptext", "For full helptext"):
        message = message.partition(repetition)[0]
    return f"{message.replace('{None}|', '').strip().rstrip('.')}. See: apportion {name} --help"


def print_json(answer: Any) -> None:
    """Strict JSON: NaN and infinities as null."""
    print(json.dumps(_strict(answer), indent=2))


def console() -> Any:
    """Where people read: the terminal's width, but wide enough for tables where the output is a file or a pipe."""
    from rich.console import Console

    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, _PIPE_WIDTH)
    return made


def existing(path: Path) -> Path:
    """The path, if there is such a file or folder."""
    if not path.exists():
        raise UserError(f"there is no {path}. Give a run folder or a JSON lines file.")
    return path


def _strict(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _strict(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_strict(v) for v in x]
    return None if isinstance(x, float) and x - x != 0 else x
