"""Seconds per training step and peak memory of this trainer and of TRL's GRPOTrainer, side by side in one run.

    python benchmarks/train_step.py                                     # 8 prompts x 8 responses x 16 tokens, about 12 minutes
    python benchmarks/train_step.py --tiny --steps 1 --rounds 1         # a random model, to see that everything works

Model, prompts, group size, response length, rewards, optimizer settings, arithmetic and threads are equal. README.md in
this folder says what is measured and what is not.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apportion.record._machine import processor

# No torch here: on Linux a process starts with the peak memory of the one that started it.

HERE = Path(__file__).resolve().parent
PARTS = ("sample", "measure", "update")
VARIANTS: dict[str, dict[str, Any]] = {
    "everything on": {"system": "ours", "skip_flat": True, "share_prompt": True, "with_dead": True},
    "TRL": {"system": "trl", "with_dead": False},
    "no skipping": {"system": "ours", "skip_flat": False, "share_prompt": True, "with_dead": False},
    "no skipping, no sharing": {"system": "ours", "skip_flat": False, "share_prompt": False, "with_dead": False},
    "TRL, dead groups": {"system": "trl", "with_dead": True},
}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console(stderr=options.json, highlight=False)
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        base = prepared(options, Path(folder))
        runs = measure(options, base, Path(folder), console)
    report = {
        "command": shlex.join(["python", "benchmarks/train_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(base),
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "page")}
        | {k: base[k] for k in ("dead", "precision", "parameters", "trl_batch")},
        "summary": summary(runs),
        "runs": runs,
    }
    console.print(table(report["summary"]))
    if options.json:
        print(json.dumps(report, indent=2))
    if options.page:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(page(report))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="folder, hub name or packaged model (%(default)s)")
    add("--tiny", action="store_true", help="a tiny random model instead: checks the benchmark, measures nothing")
    add("--prompts", type=int, default=8, help="groups a step (%(default)s)")
    add("--group", type=int, default=8, help="responses per prompt (%(default)s)")
    add("--prompt-tokens", type=int, default=64, help="length of every prompt (%(default)s)")
    add("--new-tokens", type=int, default=16, help="length of every response (%(default)s)")
    add("--dead-share", type=float, default=0.25, help="share of groups with equal rewards in 'everything on'")
    add("--steps", type=int, default=2, help="counted steps per process; one more comes before them (%(default)s)")
    add("--rounds", type=int, default=2, help="times that every system is started, in turn (%(default)s)")
    add("--threads", type=int, default=1, help="processor threads of each process (%(default)s)")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of both systems")
    add("--trl-batch", type=int, default=0, help="TRL's per-device batch; the rest is accumulated (0 = the whole step)")
    add("--control", action="store_true", help="also time TRL with the dead groups of 'everything on'")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=300.0, help="seconds after which a process is stopped (%(default)s)")
    add("--json", action="store_true", help="print the report as JSON")
    add("--page", type=Path, help="write the report as a Markdown page")
    options = parser.parse_args(argv)
    for name in ("prompts", "prompt_tokens", "new_tokens", "steps", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.group < 2:
        parser.error("--group must be at least 2: rewards are compared within a group")
    if options.trl_batch and options.prompts * options.group % options.trl_batch:
        parser.error(f"--trl-batch must divide prompts x group = {options.prompts * options.group}")
    return options


# ---- running ----------------------------------------------------------------------------------------------------------


def prepared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every process is told, after a process has written the model and the prompts."""
    base = {
        **{k: getattr(options, k) for k in ("prompts", "group", "new_tokens", "prompt_tokens", "threads", "seed")},
        "counted": options.steps,
        "dead": round(options.dead_share * options.prompts),
        "trl_batch": options.trl_batch or options.prompts * options.group,
    }
    asked = {"folder": str(folder), "tiny": options.tiny, "model": options.model, "precision": options.precision}
    status = _process("prepare", {**base, **asked}, folder, limit=None, offline=False)
    if status != "ok":
        raise SystemExit(f"train_step: the model could not be prepared: {status}")
    return base | json.loads((folder / "prepared.json").read_text())


def measure(options: argparse.Namespace, base: dict[str, Any], folder: Path, console: Console) -> list[dict[str, Any]]:
    """Every variant once per round; each second round backwards, so that a machine that slows down favours nobody."""
    names = [n for n in VARIANTS if options.control or n != "TRL, dead groups"]
    runs = []
    for number in range(1, options.rounds + 1):
        for name in names if number % 2 else reversed(names):
            run = _run(name, number, base, folder, options.limit)
            took = f"{run['seconds']:.2f} s a step, {run['memory']:.2f} GiB" if run["steps"] else "nothing measured"
            trouble = f"  ({run['status']})" if run["status"] != "ok" else ""
            console.print(f"round {number}  {name:24s} {took}{trouble}", markup=False, soft_wrap=True)
            runs.append(run)
    return runs


def _run(name: str, number: int, base: dict[str, Any], folder: Path, limit: float) -> dict[str, Any]:
    variant = VARIANTS[name]
    steps = folder / f"{number}-{list(VARIANTS).index(name)}.jsonl"
    dead = base["dead"] if variant["with_dead"] else 0
    load = os.getloadavg()[0]
    status = _process(
        variant["system"], {**base, **variant, "dead": dead, "steps": str(steps)}, folder, limit=limit, offline=True
    )
    lines = [json.loads(line) for line in steps.read_text().splitlines()] if steps.exists() else []
    counted = lines[1:]  # the first step warms up
    out: dict[str, Any] = {"variant": name, "round": number, "status": status, "load_before": load, "steps": counted}
    for key in ("seconds", *PARTS):
        out[key] = mean(s[key] for s in counted) if counted else None
    for key in ("memory", "gpu_memory", "tokens"):
        out[key] = counted[-1][key] if counted else None
    return out


def _process(what: str, work: dict[str, Any], folder: Path, *, limit: float | None, offline: bool) -> str:
    """Run one part of `_one_process.py`; "ok", or why it is not."""
    file = folder / "work.json"
    file.write_text(json.dumps(work))
    environment = os.environ | {"OMP_NUM_THREADS": str(work["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU: TRL would spread over all it sees
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, str(HERE / "_one_process.py"), what, str(file)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:g} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return "ok" if done.returncode == 0 else f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"


# ---- reporting --------------------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per variant: the spread over rounds of seconds, parts and memory, and of TRL's in units of the variant's own."""
    out = {}
    for name in dict.fromkeys(r["variant"] for r in runs):
        mine = [r for r in runs if r["variant"] == name]
        out[name] = {
            **{key: _spread([r[key] for r in mine]) for key in ("seconds", *PARTS, "memory", "gpu_memory")},
            "ratio_seconds": _spread(_ratios(runs, name, "seconds")),
            "ratio_memory": _spread(_ratios(runs, name, "memory")),
            "ratio_gpu_memory": _spread(_ratios(runs, name, "gpu_memory")),
            "counted_steps": sum(len(r["steps"]) for r in mine),
            "problems": [f"round {r['round']}: {r['status']}" for r in mine if r["status"] != "ok"],
        }
    return out


def _ratios(runs: list[dict[str, Any]], name: str, key: str) -> list[float | None]:
    """TRL's value divided by the variant's, round by round."""
    of = {(r["variant"], r["round"]): r[key] for r in runs}
    pairs = [(of["TRL", n], mine) for (variant, n), mine in of.items() if variant == name]
    return [theirs / mine if theirs and mine else None for theirs, mine in pairs]


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [v for v in values if v is not None]
    return {"min": min(known), "median": median(known), "max": max(known)} if known else None


def machine(base: dict[str, Any]) -> dict[str, Any]:
    packages = ("torch", "transformers", "trl", "accelerate", "apportion")
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": base["gpu"],
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


HEAD = ("", "seconds a step", "TRL / this", "sample", "measure", "update", "peak GiB", "TRL / this")


def rows(numbers: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table, cell by cell: medians over the rounds, with the range where there is one."""
    memory = "gpu_memory" if any(s["gpu_memory"] for s in numbers.values()) else "memory"
    keys = ("seconds", "ratio_seconds", *PARTS, memory, f"ratio_{memory}")
    return [(name, *(_cell(key, s[key]) for key in keys)) for name, s in numbers.items()]


def _cell(key: str, spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    low, mid, high = (f"{spread[k]:#.3g}".removesuffix(".") for k in ("min", "median", "max"))
    middle = mid + "x" * key.startswith("ratio_")
    return middle if low == high or key in PARTS else f"{middle} ({low}-{high})"


def problems(numbers: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{name}, {problem}" for name, s in numbers.items() for problem in s["problems"]]


def table(numbers: dict[str, dict[str, Any]]) -> Table:
    """For the terminal, which is narrow: a column per variant, ranges on a second line."""
    out = Table("", box=SIMPLE, caption=Text("\n".join(problems(numbers))) if problems(numbers) else None)
    for name in numbers:
        out.add_column(name, justify="right")
    for head, *cells in list(zip(HEAD, *rows(numbers), strict=True))[1:]:
        out.add_row(head, *(cell.replace(" (", "\n(") for cell in cells))
    return out


def page(report: dict[str, Any]) -> str:
    s, m = report["settings"], report["machine"]
    model = "a tiny random Llama (no timing worth reading)" if s["tiny"] else s["model"]
    gpu = f", {m['gpu']}" if m["gpu"] else ", no GPU"
    loads = [r["load_before"] for r in report["runs"]]
    lines = [
        "# Time and memory of a training step, beside TRL",
        "",
        f"Written by `{report['command']}` on {report['date']}. What is compared, and what is not: `benchmarks/README.md`.",
        "",
        f"- Model: {model}, {s['parameters'] / 1e6:.3g} M parameters, all trained; arithmetic {s['precision']}, weights float32.",
        f"- One step: {s['prompts']} prompts of {s['prompt_tokens']} tokens x {s['group']} responses of exactly "
        f"{s['new_tokens']} tokens, one update. TRL's per-device batch: {s['trl_batch']}.",
        f"- {s['rounds']} rounds; each starts every system once in a process of its own; {s['steps']} steps counted after one that is not.",
        f"- Machine: {m['cpu']}, {m['cores']} cores{gpu}, {s['threads']} thread(s) a process; "
        f"load before a process {min(loads):.1f} to {max(loads):.1f}.",
        f"- Python {m['python']}, " + ", ".join(f"{k} {v or 'not installed'}" for k, v in m["versions"].items()) + ".",
        f"- In `everything on`, {s['dead']} of {s['prompts']} groups have equal rewards and are skipped; elsewhere every "
        "group is mixed, unless the row says otherwise.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" + "|---:" * (len(HEAD) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(report["summary"])),
        "",
        "Medians over the rounds (of a round: the mean of its counted steps), in brackets the smallest and the largest; - = not measured. `TRL / this` above 1: TRL takes more.",
        "sample = generating; measure = rewards, credit and, in this trainer, writing the record; update = the rest of the step.",
        "",
    ]
    lines += [f"- {problem}" for problem in problems(report["summary"])]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
