"""The demo's results as a Markdown page: settings, machine, the table and the curves."""

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from apportion.record import Run


def write_page(page: Path, runs: list[Path], picture: Path, command: str, settings: str) -> None:
    """Write `page`, and the curves beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, page.with_suffix(".png"))
    groups = compared(runs)
    seeds = " ".join(str(s) for s in groups[0]["seeds"])
    page.write_text(
        f"""# The demo, on {len(groups[0]["seeds"])} seeds

    {command}

{settings}

Measured on {date.today()} with {machine()}. Seeds {seeds}; they change the order of the prompts and the sampling. The
warm-up is shared. Held-out problems are in neither the warm-up nor the reinforcement learning; before and after answer
the same {groups[0]["problems"]} problems with the same random numbers, one sampled response each (temperature 1). The
interval is a paired bootstrap of after minus before over problems and seeds.

{table(groups)}

By seed:

{table([group for run in runs for group in compared([run])], by_seed=True)}

![learning curves]({page.with_suffix(".png").name})

{costs(runs)}
"""
    )


def compared(runs: list[Path]) -> list[dict]:
    """What `apportion compare --json` says."""
    command = [sys.executable, "-m", "apportion.cli.main", "compare", *map(str, runs), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["groups"]


def table(groups: list[dict], by_seed: bool = False) -> str:
    first = "credit | seed" if by_seed else "credit"
    lines = [
        f"| {first} | sampled tokens | accuracy before | after | after - before | 95 % interval |",
        "|---" * (7 if by_seed else 6) + "|",
    ]
    for g in groups:
        name = f"{g['label']} | {g['seeds'][0]}" if by_seed else g["label"]
        low, high = g["interval"]
        numbers = f"{g['tokens']:,.0f} | {g['before']:.3f} | {g['after']:.3f} | {g['difference']:+.3f}"
        lines.append(f"| {name} | {numbers} | {low:+.3f} to {high:+.3f} |")
    return "\n".join(lines)


def costs(runs: list[Path]) -> str:
    """Seconds of a step, by method."""
    lines = ["| credit | steps | seconds a step: sampling | measuring and credit | update |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(run.name.rsplit("-", 1)[0] for run in runs):
        steps = [m for run in runs if run.name.startswith(f"{method}-") for m in Run(run).metrics("train")]
        means = [sum(m[f"seconds_{part}"] for m in steps) / len(steps) for part in ("sample", "measure", "update")]
        lines.append(f"| {method} | {len(steps)} | " + " | ".join(f"{x:.1f}" for x in means) + " |")
    return "\n".join(lines) + "\n\nTwo runs share the machine, one thread each."


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
