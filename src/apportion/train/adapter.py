"""LoRA adapters of peft: a fresh one, or the folder of one that is trained on."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.train.models import PACKAGED, resolve_model

SETTINGS = "adapter_config.json"


def base_and_adapter(name: str, *, rank: int = 0, alpha: int = 0) -> tuple[str, str | None]:
    """Where the model lies that `name` says, and the adapter on it, if `name` is one (RUN/adapter, or one on the hub).

    The base of an adapter is what its `base_model_name_or_path` says. A packaged model is also found where the user's
    cache lies elsewhere than on the machine that trained.

    Raises:
        ValueError: the adapter is not LoRA, or has another rank or alpha than asked for (0 = whatever it has), or its
            base model is not there.
    """
    folder = Path(name).expanduser()
    place = str(folder) if (folder / SETTINGS).is_file() else resolve_model(name)
    file = file_of(place, SETTINGS)
    if file is None:
        return _absolute(place), None
    settings = json.loads(file.read_text())
    _check(name, settings, rank, alpha)
    return _absolute(_base(name, str(settings.get("base_model_name_or_path")))), place


def file_of(place: str, name: str) -> Path | None:
    """A file of a model's folder, or of its repository on the hub; None where it has none or cannot be asked."""
    from transformers.utils.hub import cached_file

    silent: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    found = cached_file(place, name, **silent)
    return Path(found) if found else None


def fresh_adapter(model: Any, rank: int, alpha: int) -> Any:
    """The model with a new adapter on all linear layers, which changes nothing yet."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with _quiet():
        return get_peft_model(model, settings)


def loaded_adapter(model: Any, adapter: str) -> Any:
    """The model with an adapter from a folder, to be trained on."""
    from peft import PeftModel

    with _quiet():
        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"adapter {adapter} does not fit {model.config.name_or_path}, which its base_model_name_or_path names: its "
                f"matrices have other sizes. Write its real base model into {adapter}/{SETTINGS}."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # peft 0.21 reads an attribute that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _check(name: str, settings: dict[str, Any], rank: int, alpha: int) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"adapter {name} is of the kind {kind}, but only LORA can be trained on. Merge it first.")
    for option, asked, has in (("lora_rank", rank, settings["r"]), ("lora_alpha", alpha, settings["lora_alpha"])):
        if asked not in (0, has):
            raise ValueError(
                f"adapter {name} has {option} {has}, but {option} {asked} was asked for. Leave {option} out to train it "
                "on as it is, or give its base model to start a new one."
            )


def _base(name: str, base: str) -> str:
    packaged = Path(base).name
    try:
        return resolve_model(packaged if packaged in PACKAGED and not Path(base).is_dir() else base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"adapter {name} was trained on {base!r}, which is not here. Put the base model there, or write where it is "
            f"into {name}/{SETTINGS}, base_model_name_or_path."
        ) from error


def _absolute(place: str) -> str:
    """What an adapter says of its base must hold from every folder."""
    return str(Path(place).resolve()) if Path(place).is_dir() else place
