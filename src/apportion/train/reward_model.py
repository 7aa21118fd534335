"""A reward model: a transformer with one score for a whole conversation, read from a Hugging Face folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from apportion.tasks import Problem
from apportion.train.models import resolve_model
from apportion.train.reward_adapters import prompt_text

Scored = float | Exception
Read = dict[str, list[int]]
"""What a tokenizer makes of a text: "input_ids", "attention_mask", perhaps "token_type_ids"."""


@dataclass(frozen=True)
class RewardModel:
    """The score that a sequence classification model with one label gives to prompt and response.

    A tokenizer with a chat template gets the prompt's messages (a plain prompt is the user's message) and the response as
    the assistant's; one with a separator token gets prompt and response as a pair; any other gets one after the other.
    Of several turns it reads what the policy wrote, without the answers.
    Scores are the model's logits, unbounded: put a scale into the weight.

    Cost: one forward pass over prompt and response; the model is kept beside the policy and not trained.
    Degenerate: a text longer than the model's context fails for itself: not measured.

    Args:
        folder: a folder or a hub name that `AutoModelForSequenceClassification` loads.
        micro_tokens: padded tokens in one forward pass. Rows are sorted by length first, and padding changes a score by
            no more than rounding.

    Raises:
        ValueError: the folder has more labels than one, or its score head was not saved. Said by `check`, or when the
            model is first asked.
    """

    folder: str
    micro_tokens: int = field(default=8192, repr=False)

    name = "reward_model"

    def check(self) -> None:
        """Load the model, so that a wrong folder is found now."""
        _ = self._loaded

    @torch.no_grad()
    def score(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Scored]:
        """One score for each response; an exception in the place of one that is too long."""
        model, tokenizer = self._loaded
        read = [_conversation(tokenizer, p, t) for p, t in zip(problems, texts, strict=True)]
        lengths = [len(row["input_ids"]) for row in read]
        context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
        scores: list[Scored] = [
            ValueError(f"prompt and response have {n} tokens, but {self!r} reads 1 to {context}") for n in lengths
        ]
        for rows in _batches(lengths, self.micro_tokens, context):
            for row, value in zip(rows, _scores(model, [read[r] for r in rows]), strict=True):
                scores[row] = value
        return scores

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        folder = resolve_model(self.folder)
        labels = AutoConfig.from_pretrained(folder).num_labels
        if labels != 1:
            raise ValueError(
                f"{self!r} needs a model with one label, but this one has {labels}. Give a reward model: saved as "
                "...ForSequenceClassification with num_labels=1."
            )
        on_gpu = torch.cuda.is_available()
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto" if on_gpu else torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{self!r} has no {', '.join(sorted(info['missing_keys']))[:200]} among its weights, so its scores would be "
                "random. Give a reward model: saved as ...ForSequenceClassification after it was trained."
            )
        model.config.get_text_config().use_cache = False  # nothing is generated
        return model.eval().to("cuda" if on_gpu else "cpu"), AutoTokenizer.from_pretrained(folder)


def _conversation(tokenizer: Any, problem: Problem, text: str) -> Read:
    """Prompt and response as tokens, and what else the tokenizer says of them."""
    plain = isinstance(problem.prompt, str)
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": problem.prompt}] if plain else list(problem.prompt)
        written = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": text}], tokenize=False)
        found = tokenizer(written, add_special_tokens=False)
    else:
        prompt = prompt_text(problem)
        found = tokenizer(f"{prompt}{text}") if tokenizer.sep_token is None else tokenizer(prompt, text)
    return {name: list(values) for name, values in found.items()}


def _batches(lengths: Sequence[int], limit: int, context: int) -> Iterator[list[int]]:
    """Rows that fit into the context, shortest first, in batches of at most `limit` padded tokens."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not 0 < lengths[row] <= context:
            continue
        if batch and lengths[row] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _scores(model: Any, rows: Sequence[Read]) -> list[float]:
    """One forward pass, padded on the right.

    A decoder is read at the last token that is not its padding token. Where the folder declares none, one is chosen that
    ends no row, so that each is read at its last token.
    """
    config = model.config.get_text_config()
    declared = config.pad_token_id
    last = {row["input_ids"][-1] for row in rows}
    pad = declared if declared is not None else next(i for i in range(len(last) + 1) if i not in last)
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows], device=model.device)

    inputs = {name: padded(name, pad if name == "input_ids" else 0) for name in rows[0]}
    config.pad_token_id = pad
    try:
        logits = model(**inputs).logits
    finally:
        config.pad_token_id = declared
    return [float(x) for x in logits[:, 0].float().tolist()]
