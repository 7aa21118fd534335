"""`apportion chat RUN|MODEL`"""

import json as json_format
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from apportion.cli._app import OptionalNumber, OptionalText, call
from apportion.cli._errors import UserError
from apportion.cli._heat import visible_lines
from apportion.record import Run

if TYPE_CHECKING:
    from apportion.train import CausalPolicy
    from apportion.train.prompting import Form

OptionalShare = Annotated[float | None, tyro.conf.arg(metavar="X")]
_LIMIT = 512


def main(argv: list[str]) -> int:
    """Parse and run."""
    return call(chat, argv)


def chat(
    source: Annotated[str, tyro.conf.Positional],
    /,
    *,
    prompt: OptionalText = None,
    form: Literal["auto", "task", "chat", "raw"] = "auto",
    weights: Literal["auto", "best", "model", "checkpoint"] = "auto",
    task: OptionalText = None,
    temperature: OptionalShare = None,
    top_p: float = 1.0,
    max_new_tokens: OptionalNumber = None,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Talk to the model of a run, or to any model: a question a line, until Ctrl-D.

    A question to a run is put in the form that the prompts of its training had, each by itself. With --form chat it is
    a conversation in the model's chat template, with --form raw the text is continued as it stands.

    Examples:
      apportion chat runs/capo
      apportion chat runs/capo --prompt "7+5-3=?" --temperature 0
      apportion chat runs/capo --weights checkpoint --form chat
      apportion chat runs/warm/model --task arithmetic
      apportion chat smollm2-135m-instruct --prompt "Why is the sky blue?" --json

    Args:
        source: a run folder, or a model as train takes it: a folder, an adapter, a hub name or a packaged model.
        prompt: one question, instead of a conversation.
        form: task (as in training), chat, raw, or auto: the first of these that there is.
        weights: of a run: auto takes best, else model, else the newest checkpoint, and says which.
        task: the task whose prompts have the form; a run knows its own.
        temperature: 0 = greedy. By default the run's, else 1.
        top_p: sample from the likeliest tokens that hold this much probability.
        max_new_tokens: limit of an answer. By default the run's in the form of its task, else 512.
        seed: of the sampling.
        json: one line of JSON per answer.
    """
    talk = _loaded(source, weights, task, form)
    talk = replace(
        talk,
        temperature=talk.temperature if temperature is None else temperature,
        top_p=top_p,
        limit=talk.limit if max_new_tokens is None else max_new_tokens,
    )
    _check(talk)
    import torch

    torch.manual_seed(seed)
    if not json:
        print(_heading(talk, alone=prompt is not None), file=sys.stderr)
    history: list[dict[str, str]] = []
    for question in _questions() if prompt is None else [prompt]:
        try:
            text, ids, history = _asked(talk, question, history)
        except UserError as error:
            if prompt is not None:
                raise
            print(f"apportion: {error}", file=sys.stderr)
            continue
        answer = _answered(talk, ids, None if json else _show)
        history = [*history, {"role": "assistant", "content": answer["response"]}]
        print(json_format.dumps({"weights": talk.where, "form": talk.form, "prompt": text, **answer}) if json else "")
        sys.stdout.flush()
    return 0


@dataclass(frozen=True)
class _Talk:
    """Who answers, and how.

    Args:
        where: the weights, for people. form: task, chat or raw; `asked` is the form of a task's prompts.
        stop: texts that end a response.
    """

    policy: "CausalPolicy"
    where: str
    form: str = "raw"
    asked: "Form | None" = None
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    limit: int = _LIMIT


# ---- which weights ----------------------------------------------------------------------------------------------------


def _loaded(source: str, weights: str, task: str | None, form: str) -> _Talk:
    folder = Path(source).expanduser()
    if not (folder / "run.json").is_file():
        if weights != "auto":
            raise UserError(f"--weights {weights} belongs to a run, but {source} is none: it has no run.json.")
        return _formed(_Talk(_load(source), source), None, task, form)
    run = Run(folder)
    config = run.info.get("config") or {}
    policy, where = _weights(run, config, weights)
    talk = _Talk(policy, where, temperature=float(config.get("temperature", 1.0)))
    return _formed(talk, run, task, form)


def _load(name: str, **options: Any) -> "CausalPolicy":
    from transformers.utils import logging

    from apportion.train import CausalPolicy

    logging.set_verbosity_error()
    return CausalPolicy.load(name, **options)


def _weights(run: Run, config: dict[str, Any], asked: str) -> tuple["CausalPolicy", str]:
    """The model of the best evaluation, of the end, or of the newest checkpoint."""
    precision = config.get("precision", "auto")
    for name in ("best", "model") if asked == "auto" else (asked,):
        if name != "checkpoint" and (run.path / name / "config.json").is_file():
            return _load(str(run.path / name), precision=precision), str(run.path / name)
    found = sorted((run.path / "checkpoints").glob("done-*.pt")) if asked in ("auto", "checkpoint") else []
    if not found:
        what = f"no {asked}" if asked != "auto" else "neither best, nor model, nor a checkpoint"
        raise UserError(f"{run.path} has {what} (yet). A run writes them as --save-every and --keep-best say.")
    rank, alpha = int(config.get("lora_rank") or 0), int(config.get("lora_alpha") or 0)
    policy = _load(str(config.get("model")), lora_rank=rank, lora_alpha=alpha, precision=precision)
    _restore(policy, found[-1])
    return policy, str(found[-1])


def _restore(policy: "CausalPolicy", checkpoint: Path) -> None:
    """Copy the trained weights of a checkpoint into the model they were trained from."""
    import torch

    saved = torch.load(checkpoint, weights_only=True, mmap=True)["weights"]
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.copy_(saved[name])
    policy.refresh_sampler()


# ---- how to ask -------------------------------------------------------------------------------------------------------


def _formed(talk: _Talk, run: Run | None, task: str | None, form: str) -> _Talk:
    """The talk with the form asked for, or the first that there is."""
    from apportion.train.prompting import recorded_form

    asked: Form | None = None
    config: dict[str, Any] = {}
    if task is not None:
        asked = _form_of_task(task, talk.policy)
    elif run is not None and form in ("auto", "task"):
        asked, config = recorded_form(run), run.info.get("config") or {}
    template = getattr(talk.policy.tokenizer, "chat_template", None)
    there = {"task": asked is not None, "chat": bool(template), "raw": True}
    chosen = next(name for name in there if there[name]) if form == "auto" else form
    if not there[chosen]:
        why = {
            "task": "nothing tells the form of the prompts: no step is recorded, or they have no form in common. "
            "Give --task, or --form chat or raw",
            "chat": "the tokenizer has no chat template. Use --form raw",
        }
        raise UserError(f"--form {chosen}: {why[chosen]}.")
    if chosen != "task":
        return replace(talk, form=chosen)
    limit = int(config.get("max_new_tokens") or _LIMIT)
    return replace(talk, form=chosen, asked=asked, stop=tuple(config.get("stop") or ()), limit=limit)


def _form_of_task(text: str, policy: "CausalPolicy") -> "Form | None":
    from apportion.cli._compose import parse_task
    from apportion.train.prompting import form_of

    problems = parse_task(text).train[:8]
    return form_of((policy.tokenizer.decode(policy.prompt_ids(p)), p.question) for p in problems)


def _check(talk: _Talk) -> None:
    if not talk.temperature >= 0:
        raise UserError(f"--temperature must be at least 0; got {talk.temperature:g}. 0 is greedy.")
    if not 0 < talk.top_p <= 1:
        raise UserError(f"--top-p is a probability above 0 and at most 1; got {talk.top_p:g}.")
    if talk.limit < 1:
        raise UserError(f"--max-new-tokens must be at least 1; got {talk.limit}.")


def _heading(talk: _Talk, *, alone: bool) -> str:
    how = {
        "task": "each question by itself, in the form of the task's prompts",
        "chat": "a conversation in the model's chat template",
        "raw": "text is continued as it stands",
    }
    end = "." if alone else "; Ctrl-D ends."
    return f"{talk.where}: {how[talk.form]}; temperature {talk.temperature:g}, at most {talk.limit} tokens{end}"


def _questions() -> Iterator[str]:
    """The lines that are typed or piped in, without empty ones."""
    with suppress(ImportError):
        import readline  # noqa: F401  (editing and history for input)
    person = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if person else "")
        except EOFError:
            if person:
                print()
            return
        if line.strip():
            yield line


def _asked(talk: _Talk, question: str, history: list[dict[str, str]]) -> tuple[str, list[int], list[dict[str, str]]]:
    """What the model reads, as text and as tokens, and the conversation; its oldest words go when the context is full."""
    tokenizer, messages = talk.policy.tokenizer, [*history, {"role": "user", "content": question}]
    if question.encode(errors="ignore").decode() != question:
        raise UserError("this question is not UTF-8. Write another.")
    while True:
        if talk.form == "chat":
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = talk.asked.of(question) if talk.asked is not None else question
        ids = list(tokenizer(text, add_special_tokens=talk.form == "raw")["input_ids"])
        if 0 < len(ids) < talk.policy.context:
            return text, ids, messages
        if talk.form != "chat" or len(messages) < 3:
            raise UserError(
                f"this prompt has {len(ids)} tokens, but the model reads 1 to {talk.policy.context - 1}. Write another."
            )
        messages = messages[2:]


# ---- the answer -------------------------------------------------------------------------------------------------------


def _answered(talk: _Talk, ids: list[int], show: Callable[[str], None] | None) -> dict[str, Any]:
    """Sample an answer as the trainer does: nothing but temperature and top-p changes the model's probabilities."""
    import torch
    from transformers import GenerationConfig

    policy, model = talk.policy, talk.policy.acting_model
    limit = min(talk.limit, policy.context - len(ids))
    sampling = {"temperature": talk.temperature, "top_p": talk.top_p, "top_k": 0} if talk.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=limit,
        do_sample=bool(sampling),
        eos_token_id=policy.end_ids,
        pad_token_id=policy.pad_id,
        stop_strings=list(talk.stop) or None,
        **sampling,
    )
    model.generation_config = settings  # in place of the model's own, such as a repetition penalty
    asked = torch.tensor([ids], device=model.device)
    out = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        generation_config=settings,
        streamer=_stream(policy.tokenizer, show) if show else None,
        tokenizer=policy.tokenizer,
    )[0, len(ids) :].tolist()
    text = policy.tokenizer.decode(out, skip_special_tokens=True)
    ended = out[-1] in policy.end_ids or any(stop in text for stop in talk.stop)
    return {"response": text, "tokens": len(out), "truncated": not ended}


def _stream(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """Gives each piece of text to `show` as soon as it is whole."""
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _show(text: str) -> None:
    """A piece of the answer, made harmless."""
    print(visible_lines(text), end="", flush=True)
