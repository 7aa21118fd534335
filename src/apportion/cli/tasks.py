"""`apportion tasks`"""

from collections.abc import Mapping

from apportion.cli._app import call, print_json


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(tasks, argv)


def tasks(*, json: bool = False) -> int:
    """List the tasks that --task accepts.

    Examples:
      apportion tasks
      apportion tasks --json

    Args:
        json: print JSON.
    """
    from apportion.tasks import available

    names = available()
    about = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, "")
    if json:
        print_json([{"name": name, "about": text} for name, text in about.items()])
        return 0
    width = max(map(len, about), default=0)
    for name, text in about.items():
        print(f"{name:<{width}}  {text}".rstrip())
    return 0
