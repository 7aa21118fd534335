"""Tensors in, tensors out: sums over segments, statistics of groups, scans from the end, values of shared prefixes."""

from apportion.functional._groups import EpsInside, GroupStatistics, group_statistics, masked_whiten
from apportion.functional._prefixes import prefix_values, shrinks
from apportion.functional._scans import suffix_min, suffix_sum
from apportion.functional._segments import (
    at_members,
    segment_any,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_sum,
)

__all__ = [
    "EpsInside",
    "GroupStatistics",
    "at_members",
    "group_statistics",
    "masked_whiten",
    "prefix_values",
    "segment_any",
    "segment_count",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_sum",
    "shrinks",
    "suffix_min",
    "suffix_sum",
]
