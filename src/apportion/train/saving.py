"""Folders that other programs read: a plain Hugging Face model, or an adapter of peft."""

import os
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch


def save_model(
    model: Any, tokenizer: Any, folder: str, *, dtype: torch.dtype, end_ids: Sequence[int], pad_id: int
) -> None:
    """Write the model (an adapter merged into a copy) and its tokenizer as transformers, vLLM and llama.cpp read them.

    Args:
        dtype: of the weights in the folder.
        end_ids: every token that ends a response; `generation_config.json` names them, so that others stop there too.
        pad_id: written where the model names none.
    """
    plain = deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    if plain.dtype != dtype:
        plain = (deepcopy(plain) if plain is model else plain).to(dtype)
    own = plain.generation_config

    def write(staging: Path) -> None:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    plain.generation_config = _generation(own, list(end_ids), pad_id)
    try:
        _fill(Path(folder), write)
    finally:
        plain.generation_config = own


def save_adapter(model: Any, folder: str) -> None:
    """Write the adapter alone, in float32 as it was trained."""

    def write(staging: Path) -> None:
        model.save_pretrained(str(staging))
        (staging / "README.md").unlink(missing_ok=True)  # peft's form, to be filled in by hand

    _fill(Path(folder), write)


def _generation(settings: Any, end_ids: list[int], pad_id: int) -> Any:
    """The model's own settings of generation, with the end tokens."""
    settings = deepcopy(settings)
    settings.eos_token_id = end_ids if len(end_ids) > 1 else end_ids[0]
    if settings.pad_token_id is None:
        settings.pad_token_id = pad_id
    try:
        settings.validate(strict=True)
    except ValueError:  # as published models have it: a temperature, but do_sample left False; it may not be saved so
        settings.do_sample = True
    return settings


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Write beside the folder, then move file by file, so that a kill leaves no file half written."""
    folder = folder.expanduser().resolve()
    staging = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)
    mode = next(staging.glob("*.json")).stat().st_mode
    for weights in staging.glob("*.safetensors"):
        weights.chmod(mode)  # safetensors makes them readable for nobody else, such as the user that serves them
    shutil.copytree(staging, folder, dirs_exist_ok=True, copy_function=os.replace)
    shutil.rmtree(staging)
