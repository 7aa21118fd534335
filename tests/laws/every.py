"""The methods that the laws are about: every exported one with its defaults, and further settings and compositions."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import strategies as st

from apportion import (
    Credit,
    Estimator,
    Rollouts,
    add,
    attention_rhythm,
    bounded_return,
    branch_grpo,
    brpo,
    calm,
    capo,
    chain,
    clip,
    credit,
    decoupled_relative,
    gae,
    gdpo,
    gigpo,
    gpg,
    group_relative,
    grpo,
    hicra,
    implicit_reward,
    lare,
    max_rl,
    nsr,
    opo,
    oprl,
    optimal_token_baseline,
    partition,
    pass_at_k,
    potential,
    process_implicit,
    process_min,
    process_penalty,
    prune_depth,
    prune_width,
    returns_to_go,
    rloo,
    scale_by_sign,
    score,
    self_correction,
    signed_outcome,
    t_reg,
    tempo,
    tp_grpo,
    tree_relative,
    ucas,
    w_reinforce,
    weigh_by_duration,
    whiten,
)
from reference.batches import random_batch

EXPORTED = {name: getattr(credit, name) for name in credit.__all__}
METHODS = {n: f() for n, f in EXPORTED.items() if getattr(f, "role", None) in ("estimator", "alias")}
TRANSFORMED = {
    f"{first.name} then {n}": chain(first, f())
    for n, f in EXPORTED.items()
    if getattr(f, "role", None) == "transform"
    for first in (grpo(), gae(), process_penalty())
}
SETTINGS = [
    *(group_relative(unit=u) for u in ("token", "step", "half")),
    *(group_relative(scale=s, baseline="leave_one_out") for s in ("leave_one_out_std", "batch_std", "mean", None)),
    group_relative(reward="process", unit="step", pool="all"),
    group_relative(baseline="none", scale=None),
    group_relative(eps=0.0, ddof=0, eps_inside="var"),
    *(capo(vote=v) for v in ("majority", "union", "average")),
    gae(over="step", kl_coef=0.1, gamma=0.9),
    gae(reward="process"),
    *(gae(kl_coef="kl_coef"), returns_to_go(kl_coef="kl_coef")),
    gae(over="macro", span_value="position", span_reward="mean", alpha=0.5, gamma=0.9),
    *(gae(observations=o, critic_lam=1.0, kl_coef=0.1, gamma=0.9) for o in ("count", "valued")),
    *(returns_to_go(observations=o, gamma=0.9, reward="process") for o in ("skip", "reset", "count")),
    *(returns_to_go(observations=o, kl_coef=0.1) for o in ("reset", "count")),
    optimal_token_baseline(align="position", tail="zero"),
    optimal_token_baseline(singleton="raw", reward="process"),
    process_implicit(baseline="paper", gamma=0.9, outcome_gamma=0.5),
    process_min(temperature=None),
    process_min(baseline="step", unmeasured="process"),
    process_min(baseline="token", coef=0.0, gamma=0.9),
    tempo(scale=None),
    chain(gae(), whiten(), clip(limit=1.0)),
    chain(process_penalty(), scale_by_sign(positive=0.5, drop_zero=True), whiten(over="group")),
    group_relative(baseline="length_weighted", unit="half", scale="std", flat="unscaled"),
    *(group_relative.verl(), group_relative.nemo(), group_relative.trl(scale_rewards="batch"), max_rl.skyrl()),
    *(rloo.verl(), rloo.trl(normalize_advantages=True), gdpo.verl(weights=(1.0, 0.5)), gdpo.nemo()),
    *(opo(singleton="raw"), decoupled_relative(rewards=("outcome",), scale=None, singleton="raw")),
    *(gpg(valid="informative"), gpg(singleton="raw", f_norm=0.5), pass_at_k(norm_by_std=False)),
    *(gigpo(episodes="turn", scale=None), gigpo(omega=0.0), oprl(gate=True)),
    oprl(baseline="leave_one_out", pool="first", scale=None),
    *(calm(mode="every", gamma=0.9), calm(mode="potential"), tp_grpo(merge=False, adaptive=False)),
    *(brpo(prior="base", budgets=4, singleton="raw"), brpo(prior=(0.2, 0.0, 0.3), decay=0.0, single="zero")),
    *(branch_grpo(fusion="path", edge="sum"), tree_relative(compare="siblings", scale=None)),
    chain(branch_grpo(), prune_depth(first=1, last=1), prune_width(mode="extremes")),
    *(score(stage=1), self_correction(beta1=0.0)),
    *(ucas(reduce="sum", skip_zero_groups=True), ucas(scale=None, limit=2.0), hicra(scale="std")),
    *(attention_rhythm(mode=m, min_length=1) for m in ("local", "global", "coupled")),
    chain(gae(over="turn"), weigh_by_duration(normalise="none", max_weight=4.0)),
    *(bounded_return(form=f) for f in ("raw", "clip", "delta")),
    bounded_return(eta=0.3, alpha=1.0),
    *(implicit_reward(over="step", clip=0.5), implicit_reward(over="trajectory"), lare(form="centred")),
    *(potential(form="return"), potential(state="before", gamma=0.9), chain(grpo(), t_reg(alpha=2.0))),
    add((1.0, grpo()), (0.5, nsr()), (-2.0, capo())),
    partition({"half": chain(signed_outcome(), clip(limit=0.5)), "step": w_reinforce()}),
]
TRANSFORMS = [n for n, f in EXPORTED.items() if getattr(f, "role", None) == "transform"]
EVERY = {**METHODS, **TRANSFORMED, **{repr(e): e for e in SETTINGS}}

methods = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
SEEDS = st.integers(0, 2**32 - 1)


def batch_for(method: Estimator, seed: int, **how) -> Rollouts:
    """A random batch; for a partition its two span sets are made disjoint."""
    r = random_batch(seed, **how)
    if method.name != "partition":
        return r
    half = r.spans["half"]
    late = half.index == 1
    columns = {f.name: getattr(half, f.name) for f in fields(half)}
    pick = {k: None if v is None else v[late] for k, v in columns.items()}
    keep = {k: None if v is None else v[~late] for k, v in columns.items()}
    signals = {k: v for k, v in r.signals.items() if v.unit != "step"}
    spans = {**r.spans, "half": replace(half, **keep), "step": replace(half, **pick)}
    return r.replace(spans=spans, signals=signals)


def quiet(r: Rollouts) -> Rollouts:
    """The batch as if every measurement but the outcome had found 0."""
    return r.replace(signals={k: replace(v, values=torch.zeros_like(v.values)) for k, v in r.signals.items()})


def alone(r: Rollouts) -> Rollouts:
    """The batch with every trajectory in a group of its own; what continued another's span begins anew."""
    spans = {}
    for name, s in r.spans.items():
        if s.parent is not None:
            own = r.trajectory_ids[s.row[s.parent]] == r.trajectory_ids[s.row]
            s = replace(s, parent=torch.where(own, s.parent, -1))
        spans[name] = s
    grouped = {k: replace(v, values=v.values[r.trajectory_groups]) for k, v in r.signals.items() if v.unit == "group"}
    return r.replace(group_ids=r.trajectory_ids, spans=spans, signals={**r.signals, **grouped})


def same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def size(c: Credit, r: Rollouts) -> float:
    """The largest part anywhere: what rounding is relative to."""
    return max([1.0, *(float(v.values.abs().max()) for v in c.parts.values() if v.values.numel())])
