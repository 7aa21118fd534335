"""`apportion tasks [TASK]`"""

from dataclasses import asdict
from typing import Annotated, Any

import tyro

from apportion.cli._app import call, console, print_json


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(tasks, argv)


def tasks(
    task: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")] = None, /, *, json: bool = False
) -> int:
    """List the tasks, or look at one before training on it: its size, its first problem, near-duplicates.

    Examples:
      apportion tasks
      apportion tasks --json
      apportion tasks "from_data('train.jsonl', prompt='question', answer='answer')"

    Args:
        task: what --task of `apportion train` accepts.
        json: print JSON.
    """
    return _one(task, json) if task else _all(json)


def _one(text: str, json: bool) -> int:
    from rich.text import Text

    from apportion.cli._compose import parse_task
    from apportion.cli._heat import visible_lines

    task = parse_task(text)
    told: dict[str, Any] = {"name": task.name, "train": len(task.train), "test": len(task.test)}
    told["notes"] = list(getattr(task, "notes", ()))
    if task.train:
        told["first"] = {key: value for key, value in vars(task.train[0]).items() if key != "data"}
        told["first"]["data"] = sorted(task.train[0].data)
    if json:
        print_json(told)
        return 0
    shown = [f"{told['name']}: {told['train']} problems to train on, {told['test']} to test", *told["notes"]]
    first = told.get("first", {})
    shown += [f"\n{key}:\n{_readable(value)}" for key, value in first.items() if value and key != "question"]
    for part in shown:
        console().print(Text(visible_lines(part)), soft_wrap=True)
    return 0


def _readable(value: Any) -> str:
    """Chat messages as a line each, names in one line, text as it is."""
    if isinstance(value, str):
        return value
    return "\n".join(f"[{m['role']}] {m['content']}" for m in value) if isinstance(value[0], dict) else ", ".join(value)


def _all(json: bool) -> int:
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
