"""Where a run's numbers go: metrics.jsonl, the terminal, TensorBoard or Weights & Biases."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apportion.record import RunWriter
from apportion.train.config import Config


class Tracker(Protocol):
    """Somewhere else that wants the numbers."""

    def log(self, step: int, kind: str, numbers: dict[str, Any]) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """Nothing more will come."""


class Report:
    """Writes each line of numbers everywhere it is wanted."""

    def __init__(self, writer: RunWriter, config: Config):
        self.writer, self.config = writer, config
        self.console = Console(quiet=not config.progress, highlight=False, stderr=True)
        self.tracker = _tracker(config)

    def log(self, step: int, kind: str, **numbers: Any) -> None:
        """Record one line of numbers and print its short form."""
        self.writer.metrics(step, kind, **numbers)
        if self.tracker:
            self.tracker.log(step, kind, {k: v for k, v in numbers.items() if isinstance(v, int | float)})
        self.console.print(_line(step, kind, numbers, self.config), markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for people only."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Any]:
        """A progress bar that disappears when done; yields `advance(n)`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        visible = self.config.progress and self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not visible) as progress:
            task = progress.add_task(title, total=total)
            yield lambda n: progress.advance(task, n)

    def close(self) -> None:
        """Close what was opened."""
        if self.tracker:
            self.tracker.close()


def _line(step: int, kind: str, n: dict[str, Any], config: Config) -> str:
    if kind == "eval":
        return f"step {step:4d}  held-out {evaluated(n)}"
    if kind == "stop":
        return f"step {step:4d}  stopped: {n['reason']}"
    if kind == "warmup":
        return f"warm-up {step:3d}/{config.warmup}  loss {n['loss']:.3f} nats  {n['seconds']:.1f} s"
    grad = f"  grad {n['grad_norm']:.2f}" if "grad_norm" in n else ""  # none while a critic warms up alone
    return (
        f"step {step:4d}/{config.steps}  reward {n['reward']:.3f}  length {n['length']:.1f}  "
        f"dead groups {n['dead_groups']:.2f}{grad}  tokens {n['tokens']}  "
        f"{n['seconds_sample']:.1f}+{n['seconds_measure']:.1f}+{n['seconds_update']:.1f} s"
    )


def evaluated(n: dict[str, Any]) -> str:
    """The numbers of an evaluation in one line: accuracy with its interval, then whatever else was measured."""
    low, high = (n.get("intervals") or {}).get("accuracy", (None, None))
    between = "" if low is None else f" ({low:.3f} to {high:.3f})"
    more = [name for name in n if name.startswith(("pass@", "majority@")) or name in ("greedy", "length", "truncated")]
    told = "".join(f"  {name} {n[name]:.{1 if name == 'length' else 3}f}" for name in more)
    if n.get("unmeasured"):
        told += f"  {n['unmeasured']} unmeasured ({n.get('unmeasured_reason', 'NaN')[:80]!r})"
    return f"accuracy {n['accuracy']:.3f}{between} on {n.get('n', '?')} problems{told}"


def check_tracker(config: Config) -> None:
    """Refuse a tracker whose package, of the same name, is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if config.track != "none" and find_spec(config.track) is None:
        raise ValueError(f"track {config.track!r} needs the package {config.track}. Run: pip install {config.track}")


def _tracker(config: Config) -> Tracker | None:
    makers = {"none": lambda _: None, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    made: Tracker | None = makers[config.track](config)
    return made


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: Config):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(config.folder / "tensorboard"))

    def log(self, step: int, kind: str, numbers: dict[str, Any]) -> None:
        """One scalar per number."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb (offline if WANDB_MODE says so)."""

    def __init__(self, config: Config):
        import wandb

        self._run: Any = wandb.init(project="apportion", name=config.folder.name, config=config.printable())

    def log(self, step: int, kind: str, numbers: dict[str, Any]) -> None:
        """Numbers of one step; evaluation and training share the step axis."""
        self._run.log({"step": step, **{f"{kind}/{k}": v for k, v in numbers.items()}})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
