"""Tokens per second and peak memory of every credit method, beside the peers' own functions in the same run.

    .venv-verl/bin/python benchmarks/credit.py                                    # every method, verl beside it
    .venv-verl/bin/python benchmarks/credit.py --page docs/results/credit-speed.md
    python benchmarks/credit.py --only grpo gae --sizes 1000 64000                # without verl: ours alone

The environment of verl is made by `make test`. Three peers are no packages; give a clone's file each, if you have it:
    --gigpo verl-agent/gigpo/core_gigpo.py --tempo tempo/verl/trainer/ppo/core_algos.py
    --pure PURE/verl/trainer/ppo/core_algos.py                                    # its branch verl
README.md in this folder says what is measured and what is not.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import apportion
from apportion import Credit, Estimator, Rollouts, Signal, Spans, credit
from apportion.record._machine import processor

GROUP = 8
LENGTHS = {1_000: 32, 64_000: 256, 1_000_000: 1024, 16_000_000: 1024}
TARGET_SPEED, TARGET_MEMORY, TARGET_GROWTH = 20e6, 12.0, 1.1


# Freed memory stays with the process, as with a GPU's caching allocator: else page faults are up to half of the time.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(memory(options, max(options.sizes))))
        return 0
    peaks = elsewhere(sys.argv[1:] if argv is None else argv)
    rows: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    for size in options.sizes:
        batch = made(size, options.seed)
        for name, method in methods(options.only).items():
            seconds = timed(lambda m=method, b=batch: m(b), options.seconds)
            speed = int(batch.action_mask.sum()) / seconds
            rows.append({"method": name, "tokens": size, "seconds": seconds, "speed": speed})
            tell(rows[-1])
        for peer in peers(options, batch, size):
            beside.append(compared(peer, size, options, beside))
            tell(beside[-1])
        del batch
        gc.collect()
    report = {
        "command": shlex.join(["python", "benchmarks/credit.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "methods": rows,
        "memory": peaks,
        "growth": {name: growth(rows, name) for name in methods(options.only)},
        "peers": beside,
    }
    text = page(report)
    print(json.dumps(report, indent=2) if options.json else text)
    if options.page:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(text)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[1_000, 64_000, 1_000_000, 16_000_000], help="tokens (%(default)s)")
    add("--only", nargs="*", default=[], help="names of methods; default: all, and the peers")
    add("--seconds", type=float, default=1.0, help="each measurement repeats for so long (%(default)s)")
    add("--limit", type=float, default=60.0, help="a peer that would take longer is not run (%(default)s seconds)")
    add("--threads", type=int, default=0, help="processor threads (0 = what torch takes)")
    add("--seed", type=int, default=0)
    for name in ("gigpo", "tempo", "pure"):
        add(f"--{name}", type=Path, help=f"file with the authors' function for {name}")
    add("--page", type=Path, help="write the page there")
    add("--memory", action="store_true", help="only peak memory, as JSON, at the largest size")
    add("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args(argv)


def tell(row: dict[str, Any]) -> None:
    name, speed = row.get("peer", row.get("method")), row.get("peer_speed", row.get("speed"))
    print(f"{row['tokens']:>11,} {name:<32} {millions(speed):>8} M tokens/s", file=sys.stderr, flush=True)


# ---- the batch ----------------------------------------------------------------------------------------------------------


def made(tokens: int, seed: int = 0) -> Rollouts:
    """A ragged batch with a long tail (log-normal lengths, at most three times the median), and all that methods read.

    About a tenth of each row is an observation in its middle. Groups of eight share beginnings of up to 40 tokens.
    """
    g = torch.Generator().manual_seed(seed)
    typical = LENGTHS.get(tokens, 1024)
    lengths: list[int] = []
    while sum(lengths) < tokens or len(lengths) % GROUP:
        draw = math.exp(0.5 * float(torch.randn((), generator=g)))
        lengths.append(max(8, min(int(draw * typical), 3 * typical)))
    length = torch.tensor(lengths)
    b, t = len(lengths), int(length.max())
    place = torch.arange(t)
    inside = place < length[:, None]
    observed = (place >= (length * 0.5).long()[:, None]) & (place < (length * 0.6).long()[:, None])

    def floats(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*(shape or (b, t)), generator=g) * (high - low) + low

    ids = torch.randint(0, 50_000, (b, t), generator=g)
    shared = place < torch.randint(0, min(40, typical), (b, 1), generator=g)
    ids = torch.where(shared, ids.view(-1, GROUP, t)[:, :1].expand(-1, GROUP, -1).reshape(b, t), ids)
    rollouts = Rollouts(
        lengths=length,
        action_mask=inside & ~observed,
        group_ids=torch.arange(b) // GROUP,
        trajectory_ids=torch.arange(b),
        row_index=torch.zeros(b, dtype=torch.int64),
        tokens=ids,
        truncated=torch.zeros(b, dtype=torch.bool),
        logprobs=-floats(0, 3),
        ref_logprobs=-floats(0, 3),
        values=floats(0, 1),
        spans={
            "step": cut(length, 32),
            "turn": cut(length, 64, states=torch.randint(0, 4, (b * (t // 64 + 1),), generator=g)),
            "macro": cut(length, 5),
            "attempt": parts(length, 2),
            "budget": budgets(length),
            "branch": branches(length, g),
        },
    )
    return rollouts.with_signals(**signals(rollouts, floats))


def signals(r: Rollouts, floats: Callable[..., torch.Tensor]) -> dict[str, Signal]:
    def over(unit: str, *more: int, flag: bool = False, axes: tuple[str, ...] = ()) -> Signal:
        values = floats(0, 1, r.units(unit), *more)
        return Signal((values < 0.4).float() if flag else values, unit, axes)

    def token(low: float, high: float) -> Signal:
        return Signal(floats(low, high), "token")

    summary = r.spans["budget"].parent
    assert summary is not None
    assert r.logprobs is not None
    drawn = r.logprobs.exp()
    score = over("budget", flag=True)
    return {
        "outcome": over("trajectory", flag=True),
        "format": over("trajectory", flag=True),
        "greedy_outcome": over("group"),
        "turn_reward": over("turn"),
        "duration": over("turn"),
        "subgoal": over("turn", 2, flag=True, axes=("subgoals",)),
        "judge": over("step", 4, flag=True, axes=("critiques",)),
        "process": over("step"),
        "label": over("step", flag=True),
        "decoded": over("step"),
        "attempt_reward": over("attempt", flag=True),
        "score": Signal(torch.where(summary >= 0, score.values, torch.nan), "budget"),
        "entropy": token(0, 3),
        "self_certainty": token(1, 6),
        "sampled_logit": token(5, 20),
        "sum_pi_squared": Signal(drawn.square() + floats(0, 1) * (1 - drawn).square(), "token"),
        "waad": token(0, 9),
        "fai": token(0, 0.1),
        "planning": Signal((floats(0, 1) < 0.1).float(), "token"),
        "log_ratio": token(-1, 1),
        "contrast": token(-2, 2),
        "goal_cosine": token(-1, 1),
    }


def cut(length: torch.Tensor, size: int, states: torch.Tensor | None = None) -> Spans:
    """Spans of so many tokens that tile each row."""
    count = -(-length // size)
    row = torch.repeat_interleave(torch.arange(len(length)), count)
    index = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    stop = torch.minimum((index + 1) * size, length[row])
    return Spans(row, index * size, stop, index, None if states is None else states[: len(row)])


def parts(length: torch.Tensor, count: int, of: float = 1.0) -> Spans:
    """So many spans of equal size in the first part of each row."""
    row = torch.arange(len(length)).repeat_interleave(count)
    index = torch.arange(count).repeat(len(length))
    end = (length * of).long()[row]
    return Spans(row, end * index // count, end * (index + 1) // count, index)


def budgets(length: torch.Tensor, count: int = 4) -> Spans:
    """Four thinking segments, then a summary under each."""
    both = parts(length, 2 * count)
    index, base = both.index % count, torch.arange(len(both.row)) // (2 * count) * (2 * count)
    parent = torch.where(both.index >= count, base + index, -1)
    return Spans(both.row, both.start, both.stop, index, None, parent)


def branches(length: torch.Tensor, g: torch.Generator, count: int = 3) -> Spans:
    """Three edges a row; the first continues one of an earlier member's two inner edges, or begins at the root."""
    edges = parts(length, count)
    groups = len(length) // GROUP
    parent = torch.arange(len(edges.row)) - 1
    depth = torch.zeros(groups, GROUP, count, dtype=torch.int64)
    first = torch.full((groups, GROUP), -1)
    for k in range(GROUP):
        if k:
            member, inner = torch.randint(-1, k, (groups,), generator=g), torch.randint(0, 2, (groups,), generator=g)
            edge = (torch.arange(groups) * GROUP + member) * count + inner
            first[:, k] = torch.where(member < 0, -1, edge)
            up = depth[torch.arange(groups), member.clamp(min=0), inner] + 1
            depth[:, k, 0] = torch.where(member < 0, 0, up)
        depth[:, k, 1:] = depth[:, k, :1] + torch.arange(1, count)
    parent[::count] = first.flatten()
    return Spans(edges.row, edges.start, edges.stop, depth.flatten(), None, parent)


def methods(only: list[str]) -> dict[str, Estimator]:
    """Every exported estimator with its defaults, and every transform after `grpo`."""
    made: dict[str, Estimator] = {}
    for name in credit.__all__:
        role = getattr(getattr(credit, name), "role", None)
        if role in ("estimator", "alias"):
            made[name] = getattr(credit, name)()
        elif role == "transform":
            made[f"grpo, {name}"] = credit.chain(credit.grpo(), getattr(credit, name)())
    return {k: v for k, v in made.items() if not only or k.rpartition(" ")[2] in only}


# ---- measuring ----------------------------------------------------------------------------------------------------------


def elsewhere(argv: list[str]) -> dict[str, float | None]:
    """Peak memory, measured in a process that gives freed memory back."""
    plain = {k: v for k, v in os.environ.items() if k not in KEEP}
    command = [sys.executable, __file__, *argv, "--memory"]
    return dict(json.loads(subprocess.run(command, env=plain, check=True, stdout=subprocess.PIPE).stdout))


def memory(options: argparse.Namespace, size: int) -> dict[str, float | None]:
    batch = made(size, options.seed)
    return {name: peak(lambda m=method: m(batch), batch) for name, method in methods(options.only).items()}


def timed(call: Callable[[], Any], budget: float) -> float:
    taken: list[float] = []
    gc.collect()
    while (sum(taken) < budget and len(taken) < 50) or len(taken) < 2:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken)


def peak(call: Callable[[], Any], batch: Rollouts) -> float | None:
    """What the call needs at its peak beyond what was there, without the [B, T] parts that it returns."""
    unit = 4 * batch.action_mask.numel()
    if unit < 2**26 or not Path("/proc/self/clear_refs").exists():
        return None  # too little to be told from the allocator's own
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    used = status("VmHWM") - before
    if isinstance(result, Credit):
        used -= sum(v.values.numel() * v.values.element_size() for v in result.parts.values() if v.unit == "token")
    return used / unit


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def growth(rows: list[dict[str, Any]], name: str) -> float | None:
    """The exponent k of time = c tokens^k, by least squares from 64,000 tokens on."""
    points = [(math.log(r["tokens"]), math.log(r["seconds"])) for r in rows if r["method"] == name]
    points = [p for p in points if p[0] >= math.log(64_000)]
    if len(points) < 2:
        return None
    x, y = (sum(c) / len(points) for c in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


# ---- the peers ----------------------------------------------------------------------------------------------------------


def peers(options: argparse.Namespace, batch: Rollouts, size: int) -> list[dict[str, Any]]:
    """Pairs of calls that answer the same question: {peer, kind, ours, call, theirs}."""
    if options.only:
        return []
    found = verl_pairs(batch) if importlib.util.find_spec("verl") else []
    if options.tempo:
        found.append(tempo_pair(options.tempo, batch))
    if options.pure:
        found.append(pure_pair(options.pure, batch))
    if options.gigpo:
        found.append(gigpo_pair(options.gigpo, size, options.seed))
    return found


def scored(batch: Rollouts) -> torch.Tensor:
    """The outcome on the last token of each response, as the peers want it."""
    rewards = torch.zeros(batch.action_mask.shape)
    rewards[torch.arange(batch.batch), batch.lengths - 1] = batch.signals["outcome"].values
    return rewards


def labels(ids: torch.Tensor) -> Any:
    return ids.numpy().astype(object)


def without_gaps(batch: Rollouts) -> Rollouts:
    return batch.replace(action_mask=torch.arange(batch.width) < batch.lengths[:, None])


def verl_pairs(batch: Rollouts) -> list[dict[str, Any]]:
    from verl.trainer.ppo import core_algos

    class Settings(dict):  # verl reads its configuration by attribute and by get
        __getattr__ = dict.__getitem__

    rewards, mask, index = scored(batch), batch.action_mask.float(), labels(batch.group_ids)
    config = Settings(gamma=1.0, lam=0.95, f_norm=1.0, norm_adv_by_std_in_grpo=True)
    config["num_turns"] = 1

    def pair(name: str, function: str, kind: str, ours: Estimator, **more: Any) -> dict[str, Any]:
        f = getattr(core_algos, function)
        given = {"token_level_rewards": rewards.clone(), "response_mask": mask, **more}
        return {"peer": f"verl {name}", "kind": kind, "ours": ours, "batch": batch, "theirs": lambda: f(**given)[0]}

    grouped = {"index": index, "config": config}
    squares, whole = batch.signals["sum_pi_squared"].values, without_gaps(batch)
    relative = credit.group_relative
    return [
        pair("grpo", "compute_grpo_outcome_advantage", "loop", relative.verl(), **grouped),
        pair("grpo_vectorized", "compute_grpo_vectorized_outcome_advantage", "vectorised", relative.verl(), **grouped),
        pair("rloo", "compute_rloo_outcome_advantage", "loop", credit.rloo.verl(), **grouped),
        pair("rloo_vectorized", "compute_rloo_vectorized_outcome_advantage", "vectorised", credit.rloo(), **grouped),
        pair("opo", "compute_opo_outcome_advantage", "loop", credit.opo(), **grouped),
        pair("grpo_passk", "compute_grpo_passk_outcome_advantage", "loop", credit.pass_at_k(), **grouped),
        pair(
            "reinforce_plus_plus",
            "compute_reinforce_plus_plus_outcome_advantage",
            "loop",
            credit.reinforce_plus_plus.verl(),
            config=config,
        ),
        pair(
            "gae",
            "compute_gae_advantage_return",
            "loop",
            credit.gae.verl(lam=0.95),
            values=batch.values,
            gamma=1.0,
            lam=0.95,
        ),
        {
            **pair(
                "optimal_token_baseline",
                "compute_optimal_token_baseline_advantage",
                "loop",
                credit.optimal_token_baseline(),
                index=index,
                old_log_probs=batch.logprobs,
                sum_pi_squared=squares,
                response_mask=whole.action_mask.float(),
            ),
            "batch": whole,  # it measures responses in actions but compares positions
        },
    ]


def loaded(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tempo_pair(path: Path, batch: Rollouts) -> dict[str, Any]:
    f = loaded(path, "tempo_core_algos").compute_tempo_outcome_advantage
    whole = without_gaps(batch)  # it stops at the first gap
    given = {
        "token_level_rewards": scored(whole),
        "responses": whole.tokens,
        "response_mask": whole.action_mask.float(),
        "entropys": None,
        "index": labels(whole.group_ids),
        "lam": None,
    }
    return {"peer": "TEMPO", "kind": "loop", "ours": credit.tempo(), "batch": whole, "theirs": lambda: f(**given)[0]}


def pure_pair(path: Path, batch: Rollouts) -> dict[str, Any]:
    """PURE's credit from weighted step rewards; ours also computes the weights."""
    f = loaded(path, "pure_core_algos").compute_rloo_outcome_advantage
    ours = credit.pure(coef=0.0, horizon=batch.width)
    steps, scores = batch.spans["step"], batch.signals["process"].values
    low = torch.full((batch.batch,), torch.inf).scatter_reduce(0, steps.row, scores, "amin")
    weight = (-(scores - low[steps.row]) / 0.1).exp()
    weight = weight / torch.zeros(batch.batch).index_add(0, steps.row, weight)[steps.row]
    rewards = torch.zeros(batch.action_mask.shape)
    whole = without_gaps(batch)
    rewards[steps.row, steps.stop - 1] = weight * scores
    given = {"token_level_rewards": rewards, "eos_mask": whole.action_mask.float(), "index": labels(batch.group_ids)}
    return {"peer": "PURE", "kind": "loop", "ours": ours, "batch": whole, "theirs": lambda: f(**given)[0]}


def gigpo_pair(path: Path, size: int, seed: int) -> dict[str, Any]:
    """The authors' code has a row per turn; so has the batch here: eight turns of about 64 tokens a trajectory."""
    f = loaded(path, "core_gigpo").compute_gigpo_outcome_advantage
    g = torch.Generator().manual_seed(seed)
    turns = max(64, size // 64 // 64 * 64)
    length = torch.randint(32, 97, (turns,), generator=g)
    inside = torch.arange(96) < length[:, None]
    trajectory, reward = torch.arange(turns) // 8, torch.rand(turns, generator=g)
    state, zeros = torch.randint(0, 6, (turns,), generator=g), torch.zeros(turns, dtype=torch.int64)
    batch = Rollouts(
        lengths=length,
        action_mask=inside,
        group_ids=trajectory // GROUP,
        trajectory_ids=trajectory,
        row_index=torch.arange(turns) % 8,
        spans={"turn": Spans(torch.arange(turns), zeros, length, torch.arange(turns) % 8, state)},
    ).with_signals(turn_reward=Signal(reward, "turn"))
    later = torch.zeros(turns)
    for k in range(7, -1, -1):  # the returns, which its trainer computes elsewhere
        later[k::8] = reward[k::8] + (0.95 * later[k + 1 :: 8] if k < 7 else 0)
    total = reward.view(-1, 8).sum(1).repeat_interleave(8)
    given = {
        "token_level_rewards": torch.nn.functional.pad(total[:, None], (95, 0)),
        "step_rewards": later,
        "response_mask": inside.float(),
        "anchor_obs": labels(state),
        "index": labels(trajectory // GROUP),
        "traj_index": labels(trajectory),
        "mode": "mean_std_norm",
    }
    ours = credit.gigpo(episodes="turn")
    return {"peer": "GiGPO", "kind": "loop", "ours": ours, "batch": batch, "theirs": lambda: f(**given)[0]}


def compared(
    peer: dict[str, Any], size: int, options: argparse.Namespace, before: list[dict[str, Any]]
) -> dict[str, Any]:
    batch, ours = peer["batch"], peer["ours"]
    row: dict[str, Any] = {"peer": peer["peer"], "kind": peer["kind"], "tokens": size, "method": repr(ours)}
    tokens = int(batch.action_mask.sum())
    smaller = [r for r in before if r["peer"] == peer["peer"] and r.get("peer_seconds")]
    expected = smaller[-1]["peer_seconds"] * size / smaller[-1]["tokens"] if smaller else 0.0
    if expected > options.limit or (before and not smaller and any(r["peer"] == peer["peer"] for r in before)):
        return {**row, "skipped": f"would take about {expected:.0f} s"}
    mine = ours(batch)
    theirs = peer["theirs"]()
    gap = torch.where(mine.mask, (mine.advantages - theirs).abs(), 0.0)
    seconds = timed(lambda: ours(batch), options.seconds)
    peer_seconds = timed(peer["theirs"], options.seconds)
    return {
        **row,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "speed": tokens / seconds,
        "peer_speed": tokens / peer_seconds,
        "ratio": peer_seconds / seconds,
        "largest_difference": float(gap.max()),
    }


# ---- telling ------------------------------------------------------------------------------------------------------------


def millions(speed: float | None) -> str:
    return "-" if speed is None else f"{speed / 1e6:.3g}"


def machine() -> dict[str, Any]:
    versions = {p: metadata.version(p) for p in ("torch", "numpy", "verl") if importlib.util.find_spec(p)}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "apportion": apportion.__version__,
        **versions,
    }


def page(report: dict[str, Any]) -> str:
    m = report["machine"]
    sizes = sorted({r["tokens"] for r in report["methods"]})
    lines = [
        "# Speed of credit",
        "",
        f"Written by `{report['command']}` on {report['date']}. What is measured: `benchmarks/README.md`.",
        "",
        f"- Machine: {m['processor']}, {m['cores']} cores, no GPU, {m['threads']} thread(s); load at the end {m['load']:.1f}.",
        "- glibc keeps freed memory (`MALLOC_MMAP_MAX_=0`), for ours and the peers alike; without that, large batches spend up",
        "  to half of the time in page faults.",
        "- " + ", ".join(f"{k} {m[k]}" for k in ("python", "torch", "numpy", "verl", "apportion") if k in m) + ".",
        f"- Wanted: {TARGET_SPEED / 1e6:.0f} M tokens/s at 1 M tokens; memory at most {TARGET_MEMORY:.0f} tensors [B, T] of "
        f"float32 beyond inputs and [B, T] parts; growth exponent at most {TARGET_GROWTH}. What misses is marked `!`.",
        "",
    ]
    if report["peers"]:
        lines += peer_lines(report["peers"])
    lines += ["## Every method", "", "Millions of tokens per second, by the size of the batch.", ""]
    lines.append("| method | " + " | ".join(f"{s:,}" for s in sizes) + " | memory | growth |")
    lines.append("|---|" + "---:|" * (len(sizes) + 2))
    for name, k in report["growth"].items():
        mine = {r["tokens"]: r for r in report["methods"] if r["method"] == name}
        cells = [mark(millions(mine[s]["speed"]), s == 1_000_000 and mine[s]["speed"] < TARGET_SPEED) for s in sizes]
        used = report["memory"][name]
        cells.append("-" if used is None else mark(f"{used:.1f}", used > TARGET_MEMORY))
        cells.append("-" if k is None else mark(f"{k:.2f}", k > TARGET_GROWTH))
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def mark(text: str, missed: bool) -> str:
    return f"{text} !" if missed else text


def peer_lines(peers: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Beside the peers",
        "",
        "Times faster than the peer's own function on the same batch; wanted: 10 where it loops in Python, 1 where it is",
        "vectorised. The last column is the largest difference of the two results at the largest common size.",
        "",
    ]
    sizes = sorted({p["tokens"] for p in peers})
    lines.append("| peer | | " + " | ".join(f"{s:,}" for s in sizes) + " | difference |")
    lines.append("|---|---|" + "---:|" * (len(sizes) + 1))
    for name in dict.fromkeys(p["peer"] for p in peers):
        mine = {p["tokens"]: p for p in peers if p["peer"] == name}
        done = [p for p in mine.values() if "ratio" in p]
        kind = next(iter(mine.values()))["kind"]
        cells = [f"{mine[s]['ratio']:.3g}x" if "ratio" in mine[s] else mine[s]["skipped"] for s in sizes]
        gap = f"{done[-1]['largest_difference']:.1e}" if done else "-"
        lines.append(f"| {name} | {kind} | " + " | ".join(cells) + f" | {gap} |")
    return [*lines, ""]


if __name__ == "__main__":
    if "--memory" not in sys.argv and not KEEP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP, **os.environ})
    raise SystemExit(main())
