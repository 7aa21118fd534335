"""The model card of a run: a README.md with the header that the Hugging Face hub reads, filled from the record."""

import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from apportion.functional import mean_intervals
from apportion.record import Run
from apportion.record._machine import processor
from apportion.train.adapter import SETTINGS, base_and_adapter, file_of
from apportion.train.config import Config
from apportion.train.models import PACKAGED
from apportion.train.prompting import recorded_prompts

ORIGINALS = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Of packaged models: their name on the hub, and their licence."""
_EVALUATIONS = 12
_LONGEST = 300
_ELSEWHERE = {"model", "out", "task", "credit", "seed", "progress", "save_model", "track", "threads", "precision"}


def write_card(run_folder: Path, model_folder: Path) -> None:
    """Write the card of the run into the folder of its model or adapter."""
    (model_folder / "README.md").write_text(model_card(run_folder, model_folder), encoding="utf-8")


def model_card(run_folder: Path, model_folder: Path) -> str:
    """The card: what was trained on what and how, what it reached, on which machine, under which licence.

    Text that comes from the run (names, expressions, prompts) stands in code spans with control characters spelt out, so
    that it can break neither the header nor the page.

    Raises:
        FileNotFoundError: `run_folder` is not a recorded run.
    """
    run = Run(run_folder)
    adapter = (model_folder / SETTINGS).is_file()
    base = _base(str(_config(run).get("model")))
    parts = [
        f"---\n{_header(base, adapter)}\n---",
        f"# {_title(run.path.resolve().name)}",
        _about(run, adapter),
        _use(run, adapter),
        "## Evaluation\n\n" + _evaluation(run, model_folder.name),
        "## Training\n\n" + _training(run),
        "## Options\n\n" + _options(run),
        "## Machine and versions\n\n" + _machine(run),
        "## Licence\n\n" + _licence(base),
    ]
    return "\n\n".join(parts) + "\n"


# ---- where it comes from ----------------------------------------------------------------------------------------------


def _base(model: str) -> dict[str, str | None]:
    """The base model's name on the hub and its licence, as far as they can be known."""
    if model.lower() in ORIGINALS:
        return dict(zip(("name", "license"), ORIGINALS[model.lower()], strict=True))
    try:
        place, _ = base_and_adapter(model)
    except (OSError, ValueError):  # it has been moved since
        return {"name": None, "license": None}
    if Path(place).name in PACKAGED and Path(place).is_dir():
        return _base(Path(place).name)
    told = _told(file_of(place, "README.md"))
    name = told.get("base_model") if Path(place).is_dir() else place
    return {"name": name if _on_hub(name) else None, "license": told.get("license")}


def _told(readme: Path | None) -> dict[str, Any]:
    """The header of a model card."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard.load(readme).data.to_dict()) if readme else {}
    except Exception:  # anybody may have written it, and anything may stand in it
        return {}


def _on_hub(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _header(base: dict[str, str | None], adapter: bool) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base["name"],
        base_model_relation=("adapter" if adapter else "finetune") if base["name"] else None,
        license=base["license"],
        tags=["apportion", "reinforcement-learning", *(["lora"] if adapter else [])],
    )
    return data.to_yaml()


# ---- the sections -----------------------------------------------------------------------------------------------------


def _about(run: Run, adapter: bool) -> str:
    config, what = _config(run), "A LoRA adapter for" if adapter else "The model"
    return (
        f"{what} {_code(config.get('model'))}, trained by reinforcement learning on {_code(config.get('task'))}. "
        f"Every token got its credit from {_code(run.info.get('credit'))} of "
        f"apportion {_plain(run.info.get('versions', {}).get('apportion', ''))}."
    )


def _use(run: Run, adapter: bool) -> str:
    config = _config(run)
    asked = recorded_prompts(run)
    prompt = asked[0][0] if asked else "..."
    load = (
        "from peft import AutoPeftModelForCausalLM as Model\n"
        "from transformers import AutoTokenizer\n\n"
        'folder = "."  # of this file; the tokenizer is the base model\'s\n'
        "model = Model.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(model.peft_config['default'].base_model_name_or_path)"
        if adapter
        else "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # of this file\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)"
    )
    return (
        "A prompt as in training, and a response as it was sampled there:\n\n"
        f"```python\n{load}\n"
        f"prompt = {prompt!r}\n"
        'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")\n'
        f"out = model.generate(**ids, {_sampling(config)})\n"
        'print(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))\n```'
    )


def _sampling(config: dict[str, Any]) -> str:
    """The run's sampling, as arguments of `generate`."""
    options: dict[str, Any] = {
        "max_new_tokens": int(config.get("max_new_tokens") or 256),
        "do_sample": True,
        "temperature": float(config.get("temperature") or 1.0),
        "top_k": int(config.get("top_k") or 0),
    }
    options |= {
        name: config[name] for name, off in (("top_p", 1.0), ("min_new_tokens", 0)) if config.get(name, off) != off
    }
    said = [f"{name}={value!r}" for name, value in options.items()]
    if config.get("stop"):
        said += [f"stop_strings={list(map(str, config['stop']))!r}", "tokenizer=tokenizer"]
    return ", ".join(said)


def _evaluation(run: Run, folder: str) -> str:
    lines = [m for m in run.metrics("eval") if m.get("accuracy") is not None]
    if not lines:
        return "The run was not evaluated."
    names = [k for k in lines[-1] if k in ("accuracy", "greedy") or re.fullmatch(r"(pass|majority)@\d+", k)]
    shown = _spread(lines)
    rows = [[str(m["step"]), f"{m.get('tokens') or 0:,}", *(_measured(m, name) for name in names)] for m in shown]
    text = (
        f"Held-out problems of the task, {lines[-1].get('n')} of them, the same at each evaluation; in brackets the 95 % "
        f"interval over problems.\n\n{_table(['step', 'sampled tokens', *names], rows)}\n\n{_which(lines, folder)}"
    )
    change = _change(lines)
    return f"{text} {change}" if change else text


def _which(lines: list[dict[str, Any]], folder: str) -> str:
    if folder == "best":
        best = max(lines, key=lambda m: m["accuracy"])
        return (
            f"These weights are those of step {best['step']}, the best of {len(lines)} evaluations on these problems; being "
            "chosen by it, that accuracy is likely too high."
        )
    return "These weights are those of the last step."


def _change(lines: list[dict[str, Any]]) -> str:
    """From the first evaluation to the last, problem by problem."""
    first, last = (m.get("correct") or [] for m in (lines[0], lines[-1]))
    if len(lines) < 2 or not first or len(first) != len(last):
        return ""
    change = torch.tensor(last, dtype=torch.float64) - torch.tensor(first, dtype=torch.float64)
    if not change.any():
        return f"From step {lines[0]['step']} to step {lines[-1]['step']} the accuracy of no problem changed."
    low, high = (2 * mean_intervals((change[:, None] + 1) / 2)[0] - 1).tolist()  # of shares, which it expects
    return (
        f"From step {lines[0]['step']} to step {lines[-1]['step']} accuracy changed by {float(change.mean()):+.3f} "
        f"[{low:+.3f}, {high:+.3f}], paired by problem. One seed; other seeds may differ by more."
    )


def _training(run: Run) -> str:
    lines, warmed = run.metrics("train"), len(run.metrics("warmup"))
    supervised = f"{warmed} supervised step{'s' * (warmed != 1)} on worked solutions"
    if not lines:
        return f"{supervised}, and no policy update."
    few = min(5, len(lines))
    first, last = (_mean(m.get("reward") for m in part) for part in (lines[:few], lines[-few:]))
    seconds = sum(v for m in lines for k, v in m.items() if k.startswith("seconds") and isinstance(v, int | float))
    facts = [
        f"{lines[-1]['step']} steps, {lines[-1].get('tokens') or 0:,} sampled tokens, {seconds / 60:.1f} minutes",
        *([f"{supervised} before"] if warmed else []),
        f"mean reward of the first {few} steps {first}, of the last {few} {last}",
        *([f"started by {_code(run.info['command'])}"] if run.info.get("command") else []),
        *(f"stopped early: {_code(m.get('reason'))}" for m in run.metrics("stop")),
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def _options(run: Run) -> str:
    defaults = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    changed = {
        k: v
        for k, v in _config(run).items()
        if k not in _ELSEWHERE and _as_json(v) != _as_json(defaults.get(k, MISSING)) and v is not None
    }
    if not changed:
        return "All at their defaults."
    return f"Those that differ from the defaults:\n\n{_table(['option', 'value'], [[_code(k), _code(v)] for k, v in changed.items()])}"


def _machine(run: Run) -> str:
    config = _config(run)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    cores = f"{os.cpu_count()} processors, {config.get('threads')} in use"
    versions = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in run.info.get("versions", {}).items())
    return (
        f"- {_code(device)}, {cores}; precision {_code(config.get('precision'))}\n"
        f"- begun {_plain(run.info.get('created', ''))}, seed {_plain(run.info.get('seed', ''))}\n- {versions}"
    )


def _licence(base: dict[str, str | None]) -> str:
    if base["license"]:
        return f"That of the base model: {_code(base['license'])}."
    return "Not known: that of the base model, whose folder does not say it."


# ---- writing ----------------------------------------------------------------------------------------------------------


def _config(run: Run) -> dict[str, Any]:
    return dict(run.info.get("config") or {})


def _spread(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most twelve, evenly, the first and the last among them."""
    if len(lines) <= _EVALUATIONS:
        return lines
    return [lines[round(i * (len(lines) - 1) / (_EVALUATIONS - 1))] for i in range(_EVALUATIONS)]


def _measured(line: dict[str, Any], name: str) -> str:
    if line.get(name) is None:
        return "-"
    interval = (line.get("intervals") or {}).get(name)
    return f"{line[name]:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _mean(values: Iterable[Any]) -> str:
    known = [x for x in values if x is not None]
    return f"{sum(known) / len(known):.3f}" if known else "not measured"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _code(value: Any) -> str:
    """A code span on one line, whatever the value holds."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _title(name: str) -> str:
    return name if re.fullmatch(r"\w[\w.-]*", name) and "__" not in name else _code(name)


def _plain(value: Any) -> str:
    """Words that need no escape, such as versions and times; anything else as code."""
    return str(value) if re.fullmatch(r"[\w.+:-]*", str(value)) else _code(value)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
