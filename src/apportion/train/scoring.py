"""Measures that ask a second model, or the states of a model, about every token."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.signals import goal_cosine
from apportion.tasks import Problem
from apportion.train.learner import in_parts
from apportion.train.policy import CausalPolicy
from apportion.types import Rollouts, Signal

IMPROVE = (
    "Task:\n{question}\n\nAnswer to it:\n{response}\n\n"
    "Write the answer again so that it becomes more helpful, more correct, more coherent and more concise."
)
WORSEN = (
    "Task:\n{question}\n\nAnswer to it:\n{response}\n\n"
    "Write the answer again so that it becomes less helpful, less correct, less coherent and less concise."
)


@dataclass(eq=False)
class ModelLogRatio:
    """Measures the token signal "log_ratio": ln p of a scoring model minus ln p of the acting policy, in nats.

    `log_ratio_t = ln pi_phi(a_t | s_t) - ln pi_acting(a_t | s_t)`; the factor beta is left to the credit method.

    Source: OPRL, arXiv 2509.19199 (against the acting policy); PRIME, arXiv 2502.01456, and arXiv 2404.12358 (against a
        reference: `against="ref_logprobs"`, the model at the first policy update).
    Reads: tokens, and `against`. Scope: row. Unit: token.
    Cost: one forward pass of the scoring model, which is kept beside the policy and not trained here.
    Degenerate: the acting policy as its own scorer gives 0. Rollouts that hold no `old_logprobs` are compared with what the
        sampler recorded, which in bfloat16 differs by rounding from any other pass.

    Args:
        model: a folder, a hub name, a packaged model, a model of transformers with the policy's vocabulary, or a policy.
        against: "logprobs", those of the policy that acted (`old_logprobs` first); "ref_logprobs", those of the kept
            reference. Both at the policy's temperature, which the scoring model therefore gets too.
        micro_tokens: tokens in one forward pass.

    Raises:
        ValueError: another `against`; a vocabulary that lacks tokens of the policy; a policy of another temperature;
            not attached to a policy.
    """

    model: Any
    against: Literal["logprobs", "ref_logprobs"] = "logprobs"
    micro_tokens: int = 4096
    scorer: CausalPolicy | None = field(default=None, init=False, repr=False)

    provides = ("signals.log_ratio",)

    def __post_init__(self) -> None:
        check_against(self.against)

    def __repr__(self) -> str:
        return f"ModelLogRatio({_shown(self.model)}, against={self.against!r})"

    @property
    def requires(self) -> tuple[str, ...]:
        """The tokens and what their log-probabilities are compared with."""
        return ("tokens", *compared(self.against))

    def attach(self, policy: CausalPolicy) -> None:
        """Load the scoring model and give it the policy's temperature and precision."""
        self.scorer = second_model(self.model, policy, temperature=policy.temperature)
        check_tokens(repr(self), self.scorer, policy)
        if self.scorer.temperature != policy.temperature:
            raise ValueError(
                f"{self!r} scores at temperature {self.scorer.temperature:g}, but the policy samples at "
                f"{policy.temperature:g}. Give both the same."
            )

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"log_ratio": [B, T]}`, NaN where there is no action."""
        return {"log_ratio": log_ratio(_attached(self), rollouts, self.against, self.micro_tokens)}


@dataclass(eq=False)
class PromptContrast:
    """Measures the token signal "contrast": how much more likely a token is if the model shall improve the response.

    `contrast_t = ln p(a_t | improve, a_<t) - ln p(a_t | worsen, a_<t)` under a frozen reference. Both prompts hold the
    question and the response, and are followed by the tokens of the response as they were sampled.

    Source: T-REG, arXiv 2412.02685; the wording of the prompts is ours.
    Reads: tokens, action_mask, meta["question"]. Scope: row. Unit: token.
    Cost: two forward passes of the reference, each over the response twice; the reference is kept beside the policy.
    Degenerate: where prompt and response do not fit into the reference's context, NaN: not measured.

    Args:
        model: the reference: a folder, a hub name, a packaged model, a model of transformers with the policy's
            tokenizer, or a policy.
        improve: the prompt with {question} and {response}; a user's message where the tokenizer has a chat template,
            else plain text.
        worsen: the same with the opposite wish.
        micro_tokens: tokens in one forward pass.

    Raises:
        ValueError: a prompt that lacks {response}; rollouts without meta["question"]; not attached to a policy.
    """

    model: Any
    improve: str = IMPROVE
    worsen: str = WORSEN
    micro_tokens: int = 4096
    scorer: CausalPolicy | None = field(default=None, init=False, repr=False)

    provides = ("signals.contrast",)
    requires = ("tokens",)

    def __post_init__(self) -> None:
        for name in ("improve", "worsen"):
            if "{response}" not in getattr(self, name):
                raise ValueError(f"{name} needs {{response}} in its text; got {getattr(self, name)!r}.")

    def __repr__(self) -> str:
        own = [
            f"{n}={getattr(self, n)!r}" for n, d in (("improve", IMPROVE), ("worsen", WORSEN)) if getattr(self, n) != d
        ]
        return f"PromptContrast({', '.join([_shown(self.model), *own])})"

    def attach(self, policy: CausalPolicy) -> None:
        """Load the reference, which scores at temperature 1."""
        self.scorer = second_model(self.model, policy)

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"contrast": [B, T]}`, NaN where there is no action."""
        scorer = _attached(self)
        revised = [self._revised(scorer, rollouts, template) for template in (self.improve, self.worsen)]
        rows = (torch.stack([x.lengths for x in revised]).amax(0) <= scorer.context).nonzero()[:, 0]
        values = torch.full(rollouts.action_mask.shape, torch.nan, device=rollouts.device)
        if len(rows):
            row, place = rollouts.action_mask[rows].nonzero(as_tuple=True)
            parts = [x.select(rows) for x in revised]
            ids = [x.tokens[x.action_mask] for x in (*parts, rollouts.select(rows)) if x.tokens is not None]
            assert torch.equal(ids[0], ids[2])
            assert torch.equal(ids[1], ids[2])
            up, down = (_logprobs(scorer, x, self.micro_tokens)[x.action_mask] for x in parts)
            values[rows[row], place] = up - down
        return {"contrast": Signal(values, "token")}

    def _revised(self, scorer: CausalPolicy, rollouts: Rollouts, template: str) -> Rollouts:
        """The same responses, token by token, after the prompt of the template."""
        questions = rollouts.meta.get("question")
        if questions is None or rollouts.tokens is None:
            raise ValueError(
                'PromptContrast needs tokens and meta["question"], which this batch lacks. Give the question of every row.'
            )
        tokens, masks = [], []
        rows = zip(
            questions, _responses(rollouts), rollouts.tokens.tolist(), rollouts.action_mask.tolist(), strict=True
        )
        for question, own, row, mask in rows:
            text = template.format(
                question=question, response=scorer.tokenizer.decode(row[own], skip_special_tokens=True)
            )
            prompt = scorer.prompt_ids(_as_problem(scorer, text))
            tokens.append(prompt + row[own])
            masks.append([False] * len(prompt) + mask[own])
        return Rollouts.from_lists(tokens, list(range(rollouts.batch)), action_mask=masks).to(rollouts.device)


@dataclass(eq=False)
class GoalCosine:
    """Measures the token signal "goal_cosine": the cosine between the state after each token and a goal state.

    `cos(h_t, g)`, h the last hidden state of a model, prompts and observations included.

    Source: arXiv 2407.13887, with a reward model trained for it (`losses.contrastive_loss`).
    Reads: tokens. Scope: row. Unit: token.
    Cost: one forward pass of the model.
    Degenerate: NaN on padding.

    Args:
        goal: the goal state, such as `goal_state` gives.
        model: as in `ModelLogRatio`; None for the policy as it learns, whose states drift away from a fixed goal.
        micro_tokens: tokens in one forward pass.

    Raises:
        ValueError: a goal of another length than the states; not attached to a policy.
    """

    goal: Float[Tensor, " H"]
    model: Any = None
    micro_tokens: int = 4096
    scorer: CausalPolicy | None = field(default=None, init=False, repr=False)

    provides = ("signals.goal_cosine",)
    requires = ("tokens",)

    def __repr__(self) -> str:
        return f"GoalCosine(goal=[{len(self.goal)}], model={_shown(self.model)})"

    def attach(self, policy: CausalPolicy) -> None:
        """Load the model, or take the policy itself."""
        self.scorer = policy if self.model is None else second_model(self.model, policy)

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"goal_cosine": [B, T]}`, NaN on padding."""
        scorer, goal = _attached(self), self.goal.to(rollouts.device).float()
        size = scorer.model.config.get_text_config().hidden_size
        if goal.shape != (size,):
            raise ValueError(f"the goal must have shape [{size}], as the states of the model; got {list(goal.shape)}.")
        cosines = in_parts(rollouts, self.micro_tokens, lambda part: goal_cosine(scorer.states(part).float(), goal))
        in_use = torch.arange(rollouts.width, device=rollouts.device) < rollouts.lengths[:, None]
        return {"goal_cosine": Signal(torch.where(in_use, cosines, torch.nan), "token")}


def goal_state(policy: CausalPolicy, rollouts: Rollouts, *, micro_tokens: int = 4096) -> Float[Tensor, " H"]:
    """The mean, over all rows, of the last token's hidden state: of preferred responses, the goal of arXiv 2407.13887."""

    def at_end(part: Rollouts) -> Tensor:
        return policy.states(part).float()[torch.arange(part.batch, device=part.device), part.lengths - 1]

    return in_parts(rollouts, micro_tokens, at_end)[rollouts.lengths > 0].mean(0)


# ---- the second model -------------------------------------------------------------------------------------------------


def second_model(model: Any, policy: CausalPolicy, **settings: Any) -> CausalPolicy:
    """The model as a policy of the same precision; None gives a copy of the policy, which shares what is frozen in it."""
    if isinstance(model, CausalPolicy):
        return model
    settings = {"precision": str(policy.dtype).removeprefix("torch."), **settings}
    if isinstance(model, str):
        return CausalPolicy.load(model, **settings)
    if model is None:
        frozen = {id(p): p for p in policy.model.parameters() if not p.requires_grad}
        model = deepcopy(policy.model, frozen)
    return CausalPolicy(model, policy.tokenizer, **settings)


def check_tokens(who: str, second: CausalPolicy, policy: CausalPolicy) -> None:
    """Refuse a second model that reads the policy's tokens as others, or does not know them all."""
    known, needed = second.model.config.get_text_config().vocab_size, len(policy.tokenizer)
    cure = "Give a model with the policy's tokenizer."
    if known < needed:
        raise ValueError(f"{who} knows {known} tokens, but the policy has {needed}. {cure}")
    if second.tokenizer is policy.tokenizer:
        return
    own = second.tokenizer.get_vocab()
    for token, number in policy.tokenizer.get_vocab().items():
        if own.get(token) != number:
            raise ValueError(f"token {number} is {token!r} for the policy, but not for {who}. {cure}")


def check_against(against: str) -> None:
    """Refuse log-probabilities that no rollouts have."""
    if against not in ("logprobs", "ref_logprobs"):
        raise ValueError(f"against must be 'logprobs' or 'ref_logprobs'; got {against!r}.")


def compared(against: str) -> tuple[str, ...]:
    """What a run should supply for it: of the acting policy also a pass of the same kind as the scorer's."""
    return ("logprobs", "old_logprobs") if against == "logprobs" else (against,)


def log_ratio(scorer: CausalPolicy, rollouts: Rollouts, against: str, micro_tokens: int) -> Signal:
    """ln p of the scorer minus the field `against`, without gradient, NaN where there is no action."""
    before = rollouts.old_logprobs if against == "logprobs" else None
    ratio = _logprobs(scorer, rollouts, micro_tokens) - (getattr(rollouts, against) if before is None else before)
    return Signal(torch.where(rollouts.action_mask, ratio, torch.nan), "token")


def _as_problem(scorer: CausalPolicy, text: str) -> Problem:
    """The text as a user's message, or as it is where the tokenizer has no chat template."""
    chat = getattr(scorer.tokenizer, "chat_template", None)
    return Problem(
        id="", prompt=[{"role": "user", "content": text}] if chat else f"{text}\n\n", question=text, answer=""
    )


def _attached(measure: Any) -> CausalPolicy:
    if measure.scorer is None:
        raise ValueError(f"{measure!r} is not attached to a policy. Call attach(policy); the trainer does.")
    return measure.scorer  # type: ignore[no-any-return]


def _shown(model: Any) -> str:
    return repr(model) if isinstance(model, str | None) else type(model).__name__


def _logprobs(scorer: CausalPolicy, rollouts: Rollouts, micro_tokens: int) -> Float[Tensor, "B T"]:
    """Log-probabilities of the actions, 0 elsewhere, without gradient."""
    return in_parts(rollouts, micro_tokens, lambda part: scorer.outputs(part, part.action_mask).logprobs)


def _responses(rollouts: Rollouts) -> list[slice]:
    """Of every row, from its first action to its end."""
    first = torch.where(rollouts.action_mask.any(1), rollouts.action_mask.to(torch.int64).argmax(1), rollouts.lengths)
    return [slice(a, b) for a, b in zip(first.tolist(), rollouts.lengths.tolist(), strict=True)]
