"""Who gets the credit: estimators (rollouts to credit), transforms (credit to credit) and their compositions."""

from apportion.credit import _group_dialects, _rloo_dialects  # noqa: F401  (for their effect: group_relative.trl() ...)
from apportion.credit._anchor import gigpo
from apportion.credit._attempts import score, self_correction
from apportion.credit._base import Estimator, Transform, alias, assemble, estimator, transform
from apportion.credit._baselines import gpg, max_rl, opo, pass_at_k, remax
from apportion.credit._bounded import bounded_return, clip_delta
from apportion.credit._budget import brpo
from apportion.credit._combine import add, chain, partition
from apportion.credit._confidence import penalise_certainty, shape_by_confidence, ucas
from apportion.credit._contrast import t_reg
from apportion.credit._dense import implicit_reward, lare, potential, r_to_q, redistribution
from apportion.credit._duration import mle_agents, weigh_by_duration
from apportion.credit._gdpo import decoupled_relative, gdpo
from apportion.credit._group import dr_grpo, group_relative, grpo, rloo
from apportion.credit._implicit import oprl
from apportion.credit._optimal_baseline import optimal_token_baseline
from apportion.credit._planning import emphasise, hicra
from apportion.credit._prefix import prefix_td, tempo
from apportion.credit._prime import prime, process_implicit
from apportion.credit._process import capo, process_min, process_penalty, pure
from apportion.credit._returns import gae, ma_rlhf, vapo
from apportion.credit._reward_to_go import reinforce_plus_plus, reinforce_plus_plus_baseline, returns_to_go
from apportion.credit._rhythm import amplify_by_attention, attention_rhythm
from apportion.credit._signed import nsr, psr, signed_outcome, w_reinforce
from apportion.credit._subgoals import calm
from apportion.credit._thoughts import tp_grpo
from apportion.credit._transforms import clip, scale_by_sign, whiten, without_truncated
from apportion.credit._tree import branch_grpo, prune_depth, prune_width, tree_relative

__all__ = [
    "Estimator",
    "Transform",
    "add",
    "alias",
    "amplify_by_attention",
    "assemble",
    "attention_rhythm",
    "bounded_return",
    "branch_grpo",
    "brpo",
    "calm",
    "capo",
    "chain",
    "clip",
    "clip_delta",
    "decoupled_relative",
    "dr_grpo",
    "emphasise",
    "estimator",
    "gae",
    "gdpo",
    "gigpo",
    "gpg",
    "group_relative",
    "grpo",
    "hicra",
    "implicit_reward",
    "lare",
    "ma_rlhf",
    "max_rl",
    "mle_agents",
    "nsr",
    "opo",
    "oprl",
    "optimal_token_baseline",
    "partition",
    "pass_at_k",
    "penalise_certainty",
    "potential",
    "prefix_td",
    "prime",
    "process_implicit",
    "process_min",
    "process_penalty",
    "prune_depth",
    "prune_width",
    "psr",
    "pure",
    "r_to_q",
    "redistribution",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "returns_to_go",
    "rloo",
    "scale_by_sign",
    "score",
    "self_correction",
    "shape_by_confidence",
    "signed_outcome",
    "t_reg",
    "tempo",
    "tp_grpo",
    "transform",
    "tree_relative",
    "ucas",
    "vapo",
    "w_reinforce",
    "weigh_by_duration",
    "whiten",
    "without_truncated",
]
