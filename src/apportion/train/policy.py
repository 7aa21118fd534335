"""What the loop knows of a model: `sample(requests, sampling) -> Rollouts` and `outputs(rollouts, where) -> Outputs`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from apportion.losses import Outputs
from apportion.signals import token_statistics
from apportion.tasks import Problem, Reply
from apportion.train.activations import recompute_activations
from apportion.train.adapter import base_and_adapter, file_of, fresh_adapter, loaded_adapter
from apportion.train.packing import pack
from apportion.train.rows import Row, rollouts_of
from apportion.train.sampler import Sampled, Sampling, sample, uniform_numbers
from apportion.train.saving import save_adapter, save_model
from apportion.types import Rollouts

LOGIT_CHUNK = 256
"""Positions whose logits exist at one time: 50 MB of float32 at a vocabulary of 49,152."""
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Request:
    """One prompt to sample `count` responses for."""

    problem: Problem
    count: int


class Policy(Protocol):
    """The only thing the loop knows of a model."""

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        statistics: Sequence[str] = (),
        on_rows: Callable[[int], None] | None = None,
    ) -> Rollouts:
        """One row per response, prompt included, one group per request; with the named `statistics` as token signals."""

    def outputs(self, rollouts: Rollouts, where: Bool[Tensor, "B T"], needs: Sequence[str] = ()) -> Outputs:
        """Log-probabilities (and values, entropies) at the positions of `where`, 0 elsewhere, with gradient."""


class CausalPolicy:
    """A causal language model of transformers, with its tokenizer, an optional LoRA adapter and an optional value head.

    Weights are float32; with precision "bfloat16" the learner computes under autocast and the sampler keeps a bfloat16
    copy, refreshed after every update. "auto" takes bfloat16 where the processor has it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        precision: Precision = "auto",
        temperature: float = 1.0,
        critic: bool = False,
        share_prompt: bool = True,
        sample_rows: int = 64,
        activation_checkpointing: bool = False,
        stored_dtype: torch.dtype = torch.float32,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer  # no dropout: the ratio starts at 1
        self.stored_dtype = stored_dtype
        if activation_checkpointing:
            recompute_activations(model)
        self.dtype = _dtype(precision, model.device)
        self.temperature, self.sample_rows = temperature, sample_rows
        self.share_prompt = share_prompt and _takes_block_masks(model)
        self.value_head = _value_head(model) if critic else None
        self._reference: dict[str, Tensor] | None = None
        self.end_ids = _end_ids(model, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)

    @classmethod
    def load(
        cls, name: str, *, lora_rank: int = 0, lora_alpha: int = 0, seed: int = 0, **settings: Any
    ) -> "CausalPolicy":
        """Load a folder, hub name or packaged model (`resolve_model`); `lora_rank` > 0 adds a LoRA adapter by peft.

        The folder of an adapter (RUN/adapter) is loaded with its base model, and trained on; `lora_rank` and
        `lora_alpha` are then 0 or those it has.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # the run has its own
        base, adapter = base_and_adapter(name, rank=lora_rank, alpha=lora_alpha)
        torch.manual_seed(seed)  # fresh adapter and head weights
        tokenizer = AutoTokenizer.from_pretrained(
            adapter if adapter is not None and file_of(adapter, "tokenizer_config.json") else base
        )
        stored = AutoConfig.from_pretrained(base).dtype
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        if adapter is not None:
            model = loaded_adapter(model, adapter)
        elif lora_rank:
            model = fresh_adapter(model, lora_rank, lora_alpha or 2 * lora_rank)
        return cls(model, tokenizer, stored_dtype=stored or torch.float32, **settings)

    # ---- sampling -----------------------------------------------------------------------------------------------------

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The problem's prompt as tokens: raw text as it is, messages through the model's chat template."""
        if isinstance(problem.prompt, str):
            return list(self.tokenizer(problem.prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(list(problem.prompt), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        statistics: Sequence[str] = (),
        on_rows: Callable[[int], None] | None = None,
    ) -> Rollouts:
        """One row per response, prompt included, one group per request; groups may differ in size.

        The `statistics` (names of `signals.TOKEN_STATISTICS`) are taken where the tokens are drawn. They describe the
        distribution that was acted upon: with bfloat16 that of the sampler's copy, which `self.statistics` would not
        give back.
        """
        prompts = [self.prompt_ids(r.problem) for r in requests]
        sizes = [r.count for r in requests]
        check_lengths(prompts, [r.problem.id for r in requests], sampling.max_new_tokens, self.context)
        uniform = uniform_numbers(sum(sizes), sampling, generator)
        rows: list[Row] = []
        for g, group in enumerate(self.continued(prompts, sizes, sampling, uniform, statistics)):
            for sampled in group:
                rows.append(Row(g, requests[g].problem, prompts[g]))
                rows[-1].wrote(sampled)
            if on_rows:
                on_rows(len(group))
        return rollouts_of(rows, self.tokenizer).to(self.model.device)

    def continued(
        self,
        begun: Sequence[Sequence[int]],
        sizes: Sequence[int],
        sampling: Sampling,
        uniform: Float[Tensor, "R L"],
        statistics: Sequence[str] = (),
        limits: Sequence[int] | None = None,
    ) -> Iterator[list[Sampled]]:
        """What the policy writes after these tokens, `sizes[i]` times after `begun[i]`; see `sampler.sample`."""
        return sample(
            self.acting_model,
            begun,
            sizes,
            sampling,
            uniform,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            statistics=statistics,
            batch_rows=self.sample_rows,
            decode=partial(self.tokenizer.decode, clean_up_tokenization_spaces=False),
            limits=limits,
        )

    def reply_ids(self, problem: Problem, turn: Sequence[int], reply: Reply) -> list[int]:
        """What the policy reads between a turn it wrote and its next: the reply, and what the chat template puts around.

        Raw prompts are followed by raw text. For messages the template is rendered once, with a short conversation in
        the place of the real one, and what it writes after the assistant's words is taken; so the turn itself is never
        rendered or tokenised again. An end token that the policy wrote stands for the template's own.
        """
        assert reply.text is not None
        end = turn[-1] if turn[-1] in self.end_ids else self.end_ids[0]
        mark = str(self.tokenizer.decode([end]))
        text = reply.text
        if not isinstance(problem.prompt, str):
            text = _after_a_turn(self.tokenizer, reply.role, text)
            text = text.removeprefix(mark) if turn[-1] == end else text
        ids = list(self.tokenizer(mark + text, add_special_tokens=False)["input_ids"])
        if ids[:1] == [end] and self.tokenizer.decode(ids) == mark + text:  # in its place, not at the start of a text
            return ids[1:]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def acting_model(self) -> Any:
        """The model that samples: the trained one, or its copy in bfloat16, made when it is first needed."""
        return self.model if self.dtype == torch.float32 else _sampling_copy(self.model, self.dtype)

    def refresh_sampler(self) -> None:
        """Copy the trained weights into the sampler's copy; to be called after every update."""
        if self.acting_model is self.model:
            return
        with torch.no_grad():
            for copy, weight in zip(self.acting_model.parameters(), self.model.parameters(), strict=True):
                if weight.requires_grad:
                    copy.copy_(weight)

    # ---- learning -----------------------------------------------------------------------------------------------------

    def outputs(
        self,
        rollouts: Rollouts,
        where: Bool[Tensor, "B T"],
        needs: Sequence[str] = (),
        temperature: float | None = None,
    ) -> Outputs:
        """Log-probabilities (and "values", "entropies") at the positions of `where`, 0 elsewhere, with gradient.

        Logits exist only at those positions. They are divided by the sampling temperature (or the one given), so that
        the ratio to the sampled log-probabilities is 1 before the first update. A row's first position has no state
        before it.
        """
        return self._outputs(self.model, rollouts, where, needs, temperature or self.temperature)

    def values(self, rollouts: Rollouts, where: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The critic's values at the positions of `where`, 0 elsewhere, with gradient; no logits are formed."""
        place, states, _ = self._before(self.model, rollouts, where)
        return torch.zeros(where.shape, device=where.device).index_put(place, self._values(states))

    @torch.no_grad()
    def statistics(
        self, rollouts: Rollouts, where: Bool[Tensor, "B T"], names: Sequence[str]
    ) -> Float[Tensor, "B T K"]:
        """The named statistics (`signals.TOKEN_STATISTICS`) at the positions of `where`, NaN elsewhere, without gradient.

        In float32 they are those that the sampler takes; for rollouts that came without.
        """
        place, _, scores = self._scored(self.model, rollouts, where, self.temperature, names)
        return torch.full((*where.shape, len(names)), torch.nan, device=where.device).index_put(place, scores[:, 1:])

    @torch.no_grad()
    def states(self, rollouts: Rollouts) -> Float[Tensor, "B T H"]:
        """The last hidden state after reading each token, without gradient; what stands at padding means nothing."""
        every = torch.ones_like(rollouts.action_mask)
        with self._autocast():
            states, _ = self._states(self.model, rollouts, *every.nonzero(as_tuple=True))
        return states.view(*every.shape, -1)

    def reference_logprobs(self, rollouts: Rollouts, where: Bool[Tensor, "B T"]) -> Tensor:
        """Log-probabilities under the kept reference, without gradient."""
        with torch.no_grad(), self._as_reference():
            return self._outputs(self.model, rollouts, where, (), self.temperature).logprobs

    def keep_reference(self) -> None:
        """Remember the present weights as the reference: a copy of those that are trained; with LoRA, of the adapter."""
        self._reference = {k: p.detach().clone() for k, p in self.model.named_parameters() if p.requires_grad}

    def reference_state(self) -> dict[str, Tensor] | None:
        """What a checkpoint must hold of the reference; None where none was kept."""
        return self._reference

    def load_reference(self, state: dict[str, Tensor]) -> None:
        """The inverse of `reference_state`."""
        self._reference = {name: value.to(self.model.device, copy=True) for name, value in state.items()}

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The model computes with the weights of the reference."""
        if self._reference is None:
            raise ValueError("a reference is needed, but none was kept. Call keep_reference() before the first update.")
        named = dict(self.model.named_parameters())
        present = {name: named[name].data for name in self._reference}
        try:
            for name, value in self._reference.items():
                named[name].data = value
            yield
        finally:
            for name, value in present.items():
                named[name].data = value

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters an optimizer may change, by name; the value head's begin with `value_head.`."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.value_head is not None:
            named.update({f"value_head.{name}": p for name, p in self.value_head.named_parameters()})
        return named

    @property
    def adapted(self) -> bool:
        """Whether a LoRA adapter is trained, and the rest frozen."""
        return hasattr(self.model, "merge_and_unload")

    def save(self, folder: str) -> None:
        """Write a plain Hugging Face folder with the weights that sampled and were evaluated; an adapter is merged in.

        They are bfloat16 where the original model is stored so and the sampler's copy was bfloat16, and float32
        otherwise. Rounding what acted in float32 would lose most of a short training: after 20 steps at 1e-5 or less
        the 135M model kept a sixth of the change of its weights. For the same reason a merged adapter is float32.
        Checkpoints hold float32 in any case.
        """
        rounded = self.stored_dtype == self.dtype and not self.adapted
        save_model(
            self.model,
            self.tokenizer,
            folder,
            dtype=self.dtype if rounded else torch.float32,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
        )

    def save_adapter(self, folder: str) -> None:
        """Write the LoRA adapter alone, as peft reads it; `load` trains it on from exactly where it was.

        Raises:
            ValueError: all weights are trained.
        """
        if not self.adapted:
            raise ValueError("there is no adapter: all weights are trained. Use save(), or train with lora_rank.")
        save_adapter(self.model, folder)

    def _outputs(
        self, model: Any, rollouts: Rollouts, where: Tensor, needs: Sequence[str], temperature: float
    ) -> Outputs:
        names = ("entropy",) if "entropies" in needs else ()
        place, states, scores = self._scored(model, rollouts, where, temperature, names)

        def spread(values: Tensor) -> Tensor:
            return torch.zeros(where.shape, device=where.device).index_put(place, values)

        values = spread(self._values(states)) if "values" in needs else None
        return Outputs(spread(scores[:, 0]), values, spread(scores[:, 1]) if names else None)

    def _values(self, states: Tensor) -> Float[Tensor, " M"]:
        if self.value_head is None:
            raise ValueError('values need a critic, which this policy lacks. Train with critic="head".')
        return self.value_head(states.float())[:, 0]  # type: ignore[no-any-return]

    def _scored(
        self, model: Any, rollouts: Rollouts, where: Tensor, temperature: float, names: Sequence[str]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Rows and positions of `where`, the states before them, [M, H], and what `_scores` says of them."""
        assert rollouts.tokens is not None
        place, states, head = self._before(model, rollouts, where)
        with self._autocast():
            return place, states, _scores(head, states, rollouts.tokens[place], temperature, names)

    def _before(self, model: Any, rollouts: Rollouts, where: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Any]:
        """Rows and positions of `where`, the last hidden states before them, [M, H], and the model's output layer."""
        row, position = where.nonzero(as_tuple=True)
        if bool((position == 0).any()):
            raise ValueError(
                "a row's first token cannot be scored: nothing precedes it. Begin rows with a prompt or a start token."
            )
        with self._autocast():
            states, head = self._states(model, rollouts, row, position - 1)
        return (row, position), states, head

    def _states(self, model: Any, rollouts: Rollouts, row: Tensor, position: Tensor) -> tuple[Tensor, Any]:
        """The last hidden states at these positions, [M, H], and the model's output layer."""
        packed = pack(rollouts, pad_id=self.pad_id, share=self.share_prompt)
        mask = packed.block_mask() if self.share_prompt else packed.padding_mask()
        body, head = body_and_head(model)
        out = body(input_ids=packed.tokens, attention_mask=mask, position_ids=packed.positions, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)[packed.home[row, position]], head

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.dtype)


def _scores(
    head: Any, states: Tensor, ids: Tensor, temperature: float, names: Sequence[str]
) -> Float[Tensor, "M columns"]:
    """Log-probability of each id and the named statistics from the states before it, without ever holding all logits.

    A chunk's logits are thrown away and computed again for the gradient.
    """

    def score(part: Tensor, chosen: Tensor) -> Tensor:
        logits = head(part).float()
        more = token_statistics(logits, chosen, names=names, temperature=temperature) if names else {}
        logits = logits / temperature
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)
        return torch.stack([logprobs, *more.values()], 1)

    chunks = zip(states.split(LOGIT_CHUNK), ids.split(LOGIT_CHUNK), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(score, part, chosen, use_reentrant=False) for part, chosen in chunks])
    return torch.cat([score(part, chosen) for part, chosen in chunks])


def check_lengths(prompts: Sequence[Sequence[int]], names: Sequence[str], max_new_tokens: int, context: int) -> None:
    """Refuse prompts that leave no room for the response, naming the first."""
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise ValueError(f"problem {name} has an empty prompt. Give the model at least one token to continue.")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"problem {name} needs {len(prompt)} prompt tokens + {max_new_tokens} new ones, but the model's context has "
                f"{context}. Shorten the prompt or lower max_new_tokens."
            )


def _after_a_turn(tokenizer: Any, role: str, text: str) -> str:
    """What the chat template writes after an assistant's words when this message follows and an answer is expected."""
    words = "the-words-of-the-assistant"
    messages = [("user", "?"), ("assistant", words), (role, text)]
    whole = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in messages], tokenize=False, add_generation_prompt=True
    )
    _, found, after = str(whole).partition(words)
    if not found:
        raise ValueError(
            "the chat template leaves out what the assistant said. Use another one, or prompts of raw text."
        )
    return after


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _sampling_copy(model: Any, dtype: torch.dtype) -> Any:
    return deepcopy(model).to(dtype).requires_grad_(False)


def _takes_block_masks(model: Any) -> bool:
    """Whether every layer is plain softmax attention that obeys a 4-D mask (no sliding windows, no recurrent layers)."""
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config._attn_implementation in ("sdpa", "eager") and layers == {"full_attention"} and not windowed


def body_and_head(model: Any) -> tuple[Any, Any]:
    """The transformer without its output layer, and the output layer."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return plain.base_model, plain.get_output_embeddings()


def _value_head(model: Any) -> torch.nn.Linear:
    """V = w h + b, starting at 0."""
    head = torch.nn.Linear(model.config.hidden_size, 1).to(model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a response, as the model's generation settings and its tokenizer say."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
