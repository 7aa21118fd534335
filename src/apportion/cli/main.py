"""`apportion COMMAND ...`: finds the command, imports only that one, and says user mistakes in one line."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata

from apportion.cli._errors import nearest, one_line

COMMANDS = {
    "train": "Train a language model with a credit method, and record everything.",
    "compare": "Compare runs on equal sampled tokens: a table and learning curves.",
    "credit": "Compute the credit of logged rollouts, or check a run's.",
    "show": "Show one rollout as a heat map of credit, with the sum behind each number.",
    "chat": "Talk to the model of a run.",
    "methods": "List the credit methods and what they need.",
    "tasks": "List the tasks, or look at one.",
    "arena": "Measure how right every credit method is, in worlds whose exact advantages are known.",
    "doctor": "Say what this installation can do, and how to get the rest.",
}
_HELP = """usage: apportion COMMAND [options]

Every token gets the credit it earned.

commands:
{commands}

examples:
  apportion doctor
  apportion methods
  apportion show runs/capo
  apportion compare runs/grpo-* runs/capo-*

apportion COMMAND --help explains one command. APPORTION_DEBUG=1 shows the traceback of every error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 fine, 1 the answer is no, 2 a mistake in the call, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `apportion methods | head -3`
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("APPORTION_DEBUG") == "1":
            raise
        print(f"apportion: {line}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("", "-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(f"  {name:<9}{what}" for name, what in COMMANDS.items())))
        code = 0 if argv else 2
    elif name == "--version":
        print(metadata.version("apportion"))
        code = 0
    elif name not in COMMANDS:
        print(f"apportion: there is no command {name!r}. {nearest(name, COMMANDS)}", file=sys.stderr)
        code = 2
    else:
        code = import_module(f"apportion.cli.{name}").main(argv[1:])
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
