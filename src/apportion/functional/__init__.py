"""Tensors in, tensors out: sums over segments, statistics of groups, scans from the end, values of shared prefixes."""

from apportion.functional._bounded import BoundedForm, bounded_rewards
from apportion.functional._groups import EpsInside, GroupStatistics, Moments, group_statistics, row_moments
from apportion.functional._intervals import mean_intervals
from apportion.functional._logits import self_certainty
from apportion.functional._order import row_median, row_top
from apportion.functional._passk import majority_at_k, pass_at_k
from apportion.functional._prefixes import longest_shared, prefix_values, shrinks
from apportion.functional._readings import contrast_reward, early_stop
from apportion.functional._scans import suffix_min, suffix_sum
from apportion.functional._segments import (
    at_members,
    kept,
    segment_any,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_sum,
)
from apportion.functional._trees import tree_depth, tree_sum, tree_values

__all__ = [
    "BoundedForm",
    "EpsInside",
    "GroupStatistics",
    "Moments",
    "at_members",
    "bounded_rewards",
    "contrast_reward",
    "early_stop",
    "group_statistics",
    "kept",
    "row_moments",
    "longest_shared",
    "majority_at_k",
    "mean_intervals",
    "pass_at_k",
    "prefix_values",
    "row_median",
    "row_top",
    "segment_any",
    "segment_count",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_sum",
    "self_certainty",
    "shrinks",
    "suffix_min",
    "suffix_sum",
    "tree_depth",
    "tree_sum",
    "tree_values",
]
