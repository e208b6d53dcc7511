"""Check the path of a model before anything is loaded, and name the model by it."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from urllib.parse import unquote

from infer_align.demo.locate import PACKAGE
from infer_align.errors import ConfigError, quote

# Files one of which every folder of a model holds. Mistral's own format has params.json.
MODEL_FILES = ("config.json", "params.json")
# Other files of such a folder, one of which may be named in place of it.
PART_FILES = (
    *MODEL_FILES,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
GGUF_MAGIC = b"GGUF"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx")


def file_name(model: str) -> str | None:
    """Return the name of a model that lies in a folder or a GGUF file; None for any other."""
    path = Path(model).expanduser()
    if is_gguf(model):
        return path.stem if path.suffix.lower() == ".gguf" else path.name
    # A link keeps its own name: it is the one that the user wrote.
    return Path(os.path.abspath(path)).name if _exists(path) and path.is_dir() else None


def is_gguf(model: str) -> bool:
    """Return True for the name of a GGUF file, or of a file that begins like one.

    Ollama keeps GGUF files under names such as sha256-8934d96d3f08.
    """
    if model.lower().endswith(".gguf"):
        return True
    try:
        with Path(model).expanduser().open("rb") as stream:
            return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except (OSError, ValueError):
        return False


def is_part(model: str) -> bool:
    """Return True for the name of a file that belongs into the folder of a model."""
    return Path(model).name in PART_FILES or model.lower().endswith(WEIGHT_SUFFIXES)


def model_of_url(url: str) -> str | None:
    """Return how a model whose URL is known is written: a path or a hub id; None for another URL.

    Args:
        url: such as file:///models/mine, https://huggingface.co/ORG/NAME or hf.co/ORG/NAME.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "file":
        return unquote(rest.removeprefix("localhost")) or None
    place = rest if separator else url
    if scheme == "hf" and separator:
        place = f"hf.co/{rest}"
    host, _, path = place.partition("/")
    # Ollama and llama.cpp name a file of the model after a colon.
    parts = [part for part in re.split("[?#:]", path)[0].split("/") if part]
    is_hub = host.lower().removeprefix("www.") in {"huggingface.co", "hf.co"}
    return "/".join(parts[:2]) if is_hub and len(parts) >= 2 else None


def is_path(model: str) -> bool:
    """Return True if a model's name is a path: by its form, or because such a folder exists."""
    if model.startswith(PACKAGE):
        return False
    path = Path(model).expanduser()
    return model.startswith((".", "/", "~")) or is_gguf(model) or _exists(path)


def check_model(model: str) -> None:
    """Check a model that is named by its path. A hub id is not looked up.

    Raises:
        ConfigError: there is no such folder or file, it holds no model, or the name is a URL.
    """
    meant = model_of_url(model)
    # A copy of the hub may lie in folders of its name.
    if meant is not None and not _exists(Path(model).expanduser()):
        raise ConfigError(f"[engine] model: {quote(model)} is a URL; write {meant!r}.")
    if not is_path(model):
        return
    path = Path(model).expanduser()
    if not _exists(path):
        kind = "file" if is_gguf(model) else "folder"
        raise ConfigError(f"[engine] model: {quote(model)}: no such {kind}{_similar(path)}")
    if path.is_dir():
        _check_folder(model, path)
    elif not is_gguf(model):
        raise ConfigError(
            f"[engine] model: {model!r} is a file, but a model is a folder or a GGUF file; "
            f"name its folder: {str(path.parent)!r}."
        )


def _exists(path: Path) -> bool:
    """Return True for an existing path. A name that is too long for a path is none."""
    try:
        return path.exists()
    except OSError:
        return False


def _check_folder(model: str, folder: Path) -> None:
    files = sorted(entry.name for entry in folder.iterdir())
    ggufs = [name for name in files if is_gguf(name)]
    if ggufs or any(name in files for name in MODEL_FILES):
        return
    advice = "name the folder that holds config.json, the weights and the tokenizer."
    inner = _model_folders(folder)
    tomls = [name for name in files if name.endswith(".toml")]
    if "adapter_config.json" in files:
        advice = "it holds a LoRA adapter; merge it into its base model, and name the result."
    elif inner:
        advice = f"did you mean {str(inner[0])!r}?"
    elif tomls:
        advice = f"to use the configuration in it, name the file: {str(folder / tomls[0])!r}."
    raise ConfigError(f"[engine] model: {model!r} has no config.json, so it is no model; {advice}")


def _model_folders(folder: Path) -> list[Path]:
    """Return the folders inside a folder that hold a model."""
    models = []
    for entry in sorted(folder.iterdir()):
        if any((entry / name).exists() for name in MODEL_FILES):
            models.append(entry)
    return models


def _similar(path: Path) -> str:
    """Return the end of a sentence: the most similar entry of a path's folder, if there is one."""
    if not _exists(path.parent) or not path.parent.is_dir():
        return f" ({quote(str(path.parent))} does not exist either)."
    names = [entry.name for entry in path.parent.iterdir()]
    similar = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / similar[0])!r}?" if similar else "."


def disk_bytes(model: str) -> int:
    """Return the bytes of a model's weights on disk; 0 for a model that is not in a folder."""
    path = Path(model).expanduser()
    if not _exists(path):
        return 0
    if path.is_file():
        return path.stat().st_size
    suffixes = (*WEIGHT_SUFFIXES, ".gguf")
    total = 0
    for entry in path.iterdir():
        if entry.name.lower().endswith(suffixes) and entry.is_file():
            total += entry.stat().st_size
    return total
