"""`apportion tasks`"""

from dataclasses import asdict

from apportion.cli._app import call, console, print_json


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(tasks, argv)


def tasks(*, json: bool = False) -> int:
    """List the tasks: what each is, what it needs, and an example of what --task accepts.

    Examples:
      apportion tasks
      apportion tasks --json

    Args:
        json: print JSON.
    """
    from rich.table import Table
    from rich.text import Text

    from apportion.tasks import available

    rows = [asdict(info) for info in available()]
    if json:
        print_json(rows)
        return 0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name == "name")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row.values()))
    console().print(table)
    return 0
