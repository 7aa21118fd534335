"""What is measured before credit: written steps, judges of the steps, verifiers of the answer."""

from apportion.signals._agreement import Agreement, agreement
from apportion.signals._attention import AttentionRhythm, fai, waad
from apportion.signals._equations import arithmetic_value
from apportion.signals._factor_function import FactorFunction
from apportion.signals._llm_judge import JudgeError, LLMJudge
from apportion.signals._macro import MacroSplitter, constituents, fixed_ngrams, perplexity_runs, random_ngrams
from apportion.signals._pieces import pieces_of
from apportion.signals._process import Reply, Worker, reward_of
from apportion.signals._reward_decoder import LinearDecoder, MLPDecoder, draw_steps, rd_loss, rrd_loss
from apportion.signals._reward_functions import acted_tokens, matches, of_signal, overlong, repetition
from apportion.signals._reward_transforms import Utility, log_goodness, quantile_reference, rule_utility
from apportion.signals._split import (
    Splitter,
    blank_lines,
    lines,
    pattern,
    sentences,
    step_texts,
    steps_by_trajectory,
)
from apportion.signals._staged_reward import count_markers, staged_reward
from apportion.signals._states import anchor_states
from apportion.signals._statistics import TOKEN_STATISTICS, entropy, goal_cosine, token_statistics
from apportion.signals._strategic_grams import StrategicGrams, hashed_characters, mine_strategic_grams
from apportion.signals._tool_judge import ToolJudge, tool_judge
from apportion.signals._tree_labels import (
    TreeLabels,
    backed_up,
    consistent_paths,
    kept_steps,
    pick_child,
    right_probability,
    rollout_value,
    step_labels,
    uct,
)
from apportion.signals._verdicts import VerdictScore
from apportion.signals._verify import (
    SymbolicVerifier,
    last_number,
    marked_answer,
    numeric_answer,
    read_number,
    stated_answer,
    symbolic_answer,
)

__all__ = [
    "Agreement",
    "AttentionRhythm",
    "FactorFunction",
    "JudgeError",
    "LLMJudge",
    "LinearDecoder",
    "MLPDecoder",
    "MacroSplitter",
    "Reply",
    "Splitter",
    "StrategicGrams",
    "SymbolicVerifier",
    "TOKEN_STATISTICS",
    "ToolJudge",
    "TreeLabels",
    "Utility",
    "VerdictScore",
    "Worker",
    "acted_tokens",
    "agreement",
    "anchor_states",
    "arithmetic_value",
    "backed_up",
    "blank_lines",
    "consistent_paths",
    "constituents",
    "count_markers",
    "draw_steps",
    "entropy",
    "fai",
    "fixed_ngrams",
    "goal_cosine",
    "hashed_characters",
    "kept_steps",
    "last_number",
    "lines",
    "log_goodness",
    "marked_answer",
    "matches",
    "mine_strategic_grams",
    "numeric_answer",
    "of_signal",
    "overlong",
    "pattern",
    "perplexity_runs",
    "pick_child",
    "pieces_of",
    "quantile_reference",
    "random_ngrams",
    "rd_loss",
    "read_number",
    "repetition",
    "reward_of",
    "right_probability",
    "rollout_value",
    "rrd_loss",
    "rule_utility",
    "sentences",
    "staged_reward",
    "stated_answer",
    "step_labels",
    "step_texts",
    "steps_by_trajectory",
    "symbolic_answer",
    "token_statistics",
    "tool_judge",
    "uct",
    "waad",
]
