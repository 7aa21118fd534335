"""`apportion credit LOG.jsonl|RUN`"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from apportion.cli._app import OptionalNumber, OptionalPath, OptionalText, call, existing, print_json
from apportion.cli._compose import parse_credit
from apportion.cli._errors import UserError
from apportion.credit import Estimator
from apportion.record import Run, read_jsonl, write_jsonl
from apportion.types import Credit, Rollouts


@dataclass(frozen=True)
class _Step:
    """One batch and its credit; `recorded` is what the run used, if it came from a run that says so."""

    step: int | None
    rollouts: Rollouts
    credit: Credit
    recorded: Credit | None


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(credit, argv)


def credit(
    source: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    credit: OptionalText = None,
    step: OptionalNumber = None,
    out: OptionalPath = None,
    check: bool = False,
    json: bool = False,
) -> int:
    """Compute the credit of logged rollouts: a JSON lines file, or a recorded run.

    The schema of the file is in docs/record.md. Without --out a summary is printed. On a run, --check recomputes the
    credit of every step with the recorded composition and fails (exit code 1) unless every bit is the same.

    Examples:
      apportion credit log.jsonl --credit capo
      apportion credit log.jsonl --credit "chain(grpo(), clip(limit=2.0))" --out credit.jsonl
      apportion credit runs/capo --check
      apportion credit runs/capo --step 12 --credit grpo --out step-12.jsonl

    Args:
        source: a JSON lines file of rollouts, or a run folder.
        credit: a method, a composition as it is printed, or module:function. Default on a run: what it recorded.
        step: of a run: this step only.
        out: write the rollouts with their credit here, as JSON lines.
        check: of a run: compare with the recorded credit, bit for bit.
        json: print the summary as JSON.
    """
    is_run = existing(source).is_dir()
    _refuse(is_run, credit, step, out, check)
    estimator, steps = _from_run(Run(source), credit, step) if is_run else _from_file(source, credit)
    summaries = []
    for batch in steps:
        if check and (differs := _difference(batch)):
            print(f"apportion: step {batch.step} of {source}: {differs}", file=sys.stderr)
            return 1
        if out is not None:
            write_jsonl(out, batch.rollouts, batch.credit)
        summaries.append(_summary(batch))
    _report(estimator, summaries, check, out, json)
    return 0


def _refuse(is_run: bool, credit: str | None, step: int | None, out: Path | None, check: bool) -> None:
    if not is_run and credit is None:
        raise UserError("a log of rollouts needs --credit METHOD. See: apportion methods")
    if not is_run and (check or step is not None):
        raise UserError("--check and --step are for runs; this is a file. Give the run folder.")
    if is_run and out is not None and step is None:
        raise UserError("--out on a run needs --step N: groups of different steps are not compared with each other.")


def _from_file(path: Path, text: str | None) -> tuple[Estimator, Iterator[_Step]]:
    estimator = parse_credit(text or "")
    rollouts = read_jsonl(path)
    return estimator, iter([_Step(None, rollouts, estimator(rollouts), None)])


def _from_run(run: Run, text: str | None, step: int | None) -> tuple[Estimator, Iterator[_Step]]:
    text = text or run.info.get("credit")
    if not text:
        raise UserError(f"{run.path} does not say which credit it used. Give --credit METHOD.")
    estimator = parse_credit(text)
    steps = run.steps() if step is None else [step]
    if not steps:
        raise UserError(f"{run.path} has no rollouts yet. Wait for its first step.")
    return estimator, (_replay(run, estimator, k) for k in steps)


def _replay(run: Run, estimator: Estimator, step: int) -> _Step:
    rollouts = run.rollouts(step)
    return _Step(step, rollouts, estimator(rollouts), run.credit(step) if run.has_credit(step) else None)


# ---- checking ---------------------------------------------------------------------------------------------------------


def _difference(batch: _Step) -> str | None:
    """What differs from the record, in words; None if every bit is the same."""
    new, old = batch.credit, batch.recorded
    if old is None:
        return "no credit is recorded, so there is nothing to check against."
    for name in ("advantages", "mask", "returns"):
        if not _same(getattr(new, name), getattr(old, name)):
            return f"{name} differ from the record{_by(getattr(new, name), getattr(old, name))}."
    if list(new.parts) != list(old.parts):
        return f"the parts are {', '.join(new.parts)}, but {', '.join(old.parts)} are recorded."
    for name, part in new.parts.items():
        if part.unit != old.parts[name].unit or not _same(part.values, old.parts[name].values):
            return f"the part {name!r} differs from the record{_by(part.values, old.parts[name].values)}."
    return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _by(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None or a.shape != b.shape or not a.is_floating_point():
        return ""
    return f" by up to {float((a.double() - b.double()).abs().nan_to_num(nan=float('inf')).max()):.3g}"


# ---- telling ----------------------------------------------------------------------------------------------------------


def _summary(batch: _Step) -> dict[str, Any]:
    given = batch.credit.advantages[batch.credit.mask].double()
    counted = max(len(given), 1)
    return {
        "step": batch.step,
        "rows": batch.rollouts.batch,
        "groups": batch.rollouts.num_groups,
        "action_tokens": int(batch.rollouts.action_mask.sum()),
        "counted_tokens": len(given),
        "positive": int((given > 0).sum()) / counted,
        "negative": int((given < 0).sum()) / counted,
        "mean": float(given.mean()) if len(given) else 0.0,
        "mean_size": float(given.abs().mean()) if len(given) else 0.0,
        "largest_size": float(given.abs().max()) if len(given) else 0.0,
        "parts": {name: _size(part.values) for name, part in batch.credit.parts.items()},
        "notes": dict(batch.credit.notes),
    }


def _size(values: Tensor) -> float:
    return float(values.double().abs().nanmean()) if values.numel() else 0.0


def _report(
    estimator: Estimator, summaries: list[dict[str, Any]], check: bool, out: Path | None, as_json: bool
) -> None:
    if as_json:
        print_json({"credit": repr(estimator), "checked": check, "steps": summaries})
        return
    print(f"credit: {estimator!r}")
    for s in summaries if len(summaries) <= 1 or not check else []:
        _print_summary(s)
    if check:
        print(f"{len(summaries)} steps recomputed: every bit is as recorded")
    if out is not None:
        print(f"written: {out}")


def _print_summary(s: dict[str, Any]) -> None:
    head = "" if s["step"] is None else f"step {s['step']}: "
    print(
        f"{head}{s['rows']} rows in {s['groups']} groups, {s['counted_tokens']} of {s['action_tokens']} action tokens "
        f"counted: {s['positive']:.0%} up, {s['negative']:.0%} down; advantage mean {s['mean']:+.4f}, "
        f"mean size {s['mean_size']:.4f}, largest {s['largest_size']:.4f}"
    )
    if s["parts"]:
        print("  mean size of the parts: " + ", ".join(f"{name} {x:.4f}" for name, x in s["parts"].items()))
    if s["notes"]:
        print("  notes: " + ", ".join(f"{name} {x:g}" for name, x in s["notes"].items()))
