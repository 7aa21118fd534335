"""What is measured before credit: written steps, judges of the steps, verifiers of the answer."""

from apportion.signals._llm_judge import JudgeError, LLMJudge
from apportion.signals._pieces import pieces_of
from apportion.signals._process import Reply, Worker, reward_of
from apportion.signals._split import Splitter, blank_lines, lines, pattern, sentences
from apportion.signals._tool_judge import ToolJudge, tool_judge
from apportion.signals._verdicts import VerdictScore
from apportion.signals._verify import SymbolicVerifier, last_number, numeric_answer, read_number, symbolic_answer

__all__ = [
    "JudgeError",
    "LLMJudge",
    "Reply",
    "Splitter",
    "SymbolicVerifier",
    "ToolJudge",
    "VerdictScore",
    "Worker",
    "blank_lines",
    "last_number",
    "lines",
    "numeric_answer",
    "pattern",
    "pieces_of",
    "read_number",
    "reward_of",
    "sentences",
    "symbolic_answer",
    "tool_judge",
]
