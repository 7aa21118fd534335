"""Who gets the credit: estimators (rollouts to credit), transforms (credit to credit) and their compositions."""

from apportion.credit._base import Estimator, Transform, alias, assemble, estimator, transform
from apportion.credit._combine import add, chain, partition
from apportion.credit._group import dr_grpo, group_relative, grpo, rloo
from apportion.credit._prefix import prefix_td, tempo
from apportion.credit._process import capo, process_min, process_penalty, pure
from apportion.credit._returns import gae
from apportion.credit._signed import nsr, psr, signed_outcome, w_reinforce
from apportion.credit._transforms import clip, scale_by_sign, whiten

__all__ = [
    "Estimator",
    "Transform",
    "add",
    "alias",
    "assemble",
    "capo",
    "chain",
    "clip",
    "dr_grpo",
    "estimator",
    "gae",
    "group_relative",
    "grpo",
    "nsr",
    "partition",
    "prefix_td",
    "process_min",
    "process_penalty",
    "psr",
    "pure",
    "rloo",
    "scale_by_sign",
    "signed_outcome",
    "tempo",
    "transform",
    "w_reinforce",
    "whiten",
]
