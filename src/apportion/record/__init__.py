"""Runs on disk: rollouts and credit as Parquet, metrics as JSON lines; logs of others as JSON lines."""

from apportion.record._jsonl import read_jsonl, to_dicts, write_jsonl
from apportion.record._run import Run, RunWriter

__all__ = ["Run", "RunWriter", "read_jsonl", "to_dicts", "write_jsonl"]
