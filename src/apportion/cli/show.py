"""`apportion show RUN|LOG.jsonl`"""

from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.text import Text

from apportion.cli import _heat
from apportion.cli._app import OptionalNumber, OptionalText, call, console, existing, print_json
from apportion.cli._compose import parse_credit, short
from apportion.cli._curves import stopped
from apportion.cli._errors import UserError
from apportion.record import Run, read_jsonl
from apportion.types import Credit, Rollouts


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(show, argv)


def show(
    source: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    step: OptionalNumber = None,
    row: OptionalNumber = None,
    prompt: OptionalText = None,
    credit: OptionalText = None,
    tokens: bool = False,
    json: bool = False,
) -> int:
    """Show one rollout as a heat map of credit (blue: credit, orange: blame), with the sum behind each number.

    By default the rollout with the largest spread of credit, in the last step that has any. Below it stand the run's
    last evaluation and, if it stopped early, why.

    Examples:
      apportion show runs/capo
      apportion show runs/capo --step 12 --row 3 --tokens
      apportion show runs/grpo --prompt chain-17 --credit "capo(penalty=1.0)"
      apportion show log.jsonl --credit grpo --json

    Args:
        source: a run folder, or a JSON lines file of rollouts (docs/record.md).
        step: of a run: the step.
        row: the row of the step or file.
        prompt: the prompt id, among whose rows the one with the largest spread is shown.
        credit: of a file: the method (needed). Of a run: another method than the one recorded.
        tokens: one line per token in the table of sums.
        json: print JSON.
    """
    number, rollouts, given = _load(existing(source), step, credit, any_step=row is None and prompt is None)
    method = short(credit or str(Run(source).info.get("credit")))
    chosen = _choose(rollouts, given, row, prompt)
    view = _heat.view_of(rollouts, given, chosen)
    if json:
        print_json({**_as_json(view, rollouts, number, method), **_state(source)})
    else:
        _print(view, _title(view, rollouts, number, method), tokens)
        _print_state(**_state(source))
    return 0


# ---- choosing ---------------------------------------------------------------------------------------------------------


def _load(source: Path, step: int | None, text: str | None, any_step: bool) -> tuple[int | None, Rollouts, Credit]:
    if not source.is_dir():
        if text is None or step is not None:
            raise UserError("a file of rollouts needs --credit METHOD and has no --step. See: apportion methods")
        estimator, rollouts = parse_credit(text), read_jsonl(source)
        return None, rollouts, estimator(rollouts)
    run = Run(source)
    steps = run.steps() if step is None else [step]
    if not steps:
        raise UserError(f"{run.path} has no rollouts yet. Wait for its first step.")
    for number in reversed(steps if any_step else steps[-1:]):
        rollouts = run.rollouts(number)
        given = run.credit(number) if text is None else parse_credit(text)(rollouts)
        if bool(given.advantages.any()):
            return number, rollouts, given
    if number != steps[-1]:  # no step has any credit: show the last one
        return _load(source, steps[-1], text, any_step=False)
    return number, rollouts, given


def _choose(rollouts: Rollouts, credit: Credit, row: int | None, prompt: str | None) -> int:
    """The row asked for, or the one with the largest spread of credit."""
    if row is not None:
        if not 0 <= row < rollouts.batch:
            raise UserError(f"--row {row}: there are rows 0 to {rollouts.batch - 1}.")
        return row
    rows = range(rollouts.batch) if prompt is None else _rows_of(rollouts, prompt)
    if not rows or not rollouts.width:
        raise UserError("there are no tokens to show: every rollout is empty.")
    low = torch.where(credit.mask, credit.advantages, torch.inf).amin(1)
    high = torch.where(credit.mask, credit.advantages, -torch.inf).amax(1)
    size = torch.where(credit.mask, credit.advantages.abs(), 0).amax(1)
    return max(rows, key=lambda b: (float(high[b] - low[b]), float(size[b])))


def _rows_of(rollouts: Rollouts, prompt: str) -> list[int]:
    if "prompt_id" not in rollouts.meta:
        raise UserError('--prompt needs the key "prompt_id" in the rollouts, which these lack. Use --row.')
    ids = [str(x) for x in rollouts.meta["prompt_id"]]
    if prompt not in ids:
        raise UserError(f"--prompt {prompt}: not in this step. There is: {', '.join(dict.fromkeys(ids))}.")
    return [b for b, x in enumerate(ids) if x == prompt]


# ---- telling ----------------------------------------------------------------------------------------------------------


def _print(view: _heat.View, title: str, every_token: bool) -> None:
    out = console()
    out.print(Text(_heat.visible(title), "bold"))
    out.print(_heat.legend(view))
    out.print()
    out.print(_heat.heat_map(view))
    out.print()
    out.print(_heat.sums(view, every_token=every_token))


def _state(source: Path) -> dict[str, Any]:
    """The last evaluation of a run, and where and why it stopped if it did so early; None where there is none."""
    run = Run(source) if source.is_dir() else None
    evaluations = [] if run is None else run.metrics("eval")
    return {
        "evaluation": evaluations[-1] if evaluations else None,
        "stopped": None if run is None else stopped(run),
    }


def _print_state(evaluation: dict[str, Any] | None, stopped: dict[str, Any] | None) -> None:
    from apportion.train.report import evaluated

    told = [f"held-out after step {evaluation['step']}: {evaluated(evaluation)}"] if evaluation else []
    told += [f"the run stopped early, after step {stopped['step']}: {stopped['reason']}"] if stopped else []
    for line in told:
        console().print(Text("\n" + _heat.visible(line)))


def _title(view: _heat.View, rollouts: Rollouts, step: int | None, method: str) -> str:
    facts = [method, *([f"step {step}"] if step is not None else []), f"row {view.row}"]
    known = [name for name in ("prompt_id", "answer") if name in rollouts.meta]
    facts += [f"{name.removesuffix('_id')} {rollouts.meta[name][view.row]}" for name in known]
    facts += [f"outcome {view.outcome:g}"] if view.outcome is not None else []
    if rollouts.truncated is not None and bool(rollouts.truncated[view.row]):
        facts.append("truncated")
    return ", ".join(facts)


def _as_json(view: _heat.View, rollouts: Rollouts, step: int | None, method: str) -> dict[str, Any]:
    meta = {k: rollouts.meta[k][view.row] for k in ("prompt_id", "question", "answer", "text") if k in rollouts.meta}
    tokens = [
        {
            "position": t,
            "piece": piece,
            "step": view.step_ids[t],
            "counted": view.counted[t],
            "advantage": view.advantages[t],
            "parts": {name: values[t] for name, values in view.parts.items()},
        }
        for t, piece in enumerate(view.pieces)
        if view.action[t]
    ]
    steps = [
        {
            "start": start,
            "stop": stop,
            "text": "".join(view.pieces[start:stop]),
            "judge": view.judge[i] if view.judge else None,
            "process": view.process[i] if view.process else None,
        }
        for i, (start, stop) in enumerate(view.steps)
    ]
    where = {"credit": method, "step": step, "row": view.row}
    return {**where, **meta, "outcome": view.outcome, "steps": steps, "tokens": tokens}
