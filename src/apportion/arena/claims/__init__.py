"""What papers claim of their methods, held against worlds that know the answer: one file for each claim."""

from collections.abc import Callable

from apportion.arena.claims._bounded import (
    clip_and_delta_bound_repeats,
    clip_delta_stops_padding,
    clip_stops_padding,
    delta_stops_padding,
)
from apportion.arena.claims._branch_grpo import branch_grpo_beats_uniform
from apportion.arena.claims._brpo import brpo_helps_long_thinking, brpo_lowers_variance
from apportion.arena.claims._capo import capo_localises, capo_votes
from apportion.arena.claims._core import Claim, decide, mean_of
from apportion.arena.claims._exploration import (
    attention_rhythm_learns_faster,
    hicra_keeps_plans_open,
    ucas_keeps_exploring,
)
from apportion.arena.claims._gigpo import gigpo_finds_waste
from apportion.arena.claims._lare import lare_between_companions, lare_finds_what_matters, lare_learns_from_less
from apportion.arena.claims._ma_rlhf import ma_rlhf_learns_in_fewer_steps
from apportion.arena.claims._nsr import nsr_keeps_pass_at_k, nsr_loses_less_than_psr
from apportion.arena.claims._oprl import oprl_orders_actions, oprl_over_grpo
from apportion.arena.claims._pure import pure_survives_hacking
from apportion.arena.claims._tempo import tempo_credits_early_decisions, tempo_credits_late_decisions, tempo_is_grpo

CLAIMS: tuple[Callable[..., Claim], ...] = (
    capo_localises,
    capo_votes,
    tempo_is_grpo,
    tempo_credits_early_decisions,
    tempo_credits_late_decisions,
    pure_survives_hacking,
    clip_and_delta_bound_repeats,
    clip_stops_padding,
    delta_stops_padding,
    clip_delta_stops_padding,
    brpo_lowers_variance,
    brpo_helps_long_thinking,
    oprl_orders_actions,
    oprl_over_grpo,
    lare_finds_what_matters,
    lare_between_companions,
    lare_learns_from_less,
    gigpo_finds_waste,
    nsr_loses_less_than_psr,
    nsr_keeps_pass_at_k,
    hicra_keeps_plans_open,
    ucas_keeps_exploring,
    attention_rhythm_learns_faster,
    ma_rlhf_learns_in_fewer_steps,
    branch_grpo_beats_uniform,
)
"""One function per claim, in the order of the report. Called with `quick=True` each takes seconds, else minutes."""

__all__ = ["CLAIMS", "Claim", "decide", "mean_of"]
