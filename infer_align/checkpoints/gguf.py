"""Read a GGUF file, the format of llama.cpp, with transformers.

transformers unpacks a GGUF file in Python, which takes much longer than reading safetensors. So the
unpacked model is kept in a cache, in the type it is served in, and loaded from there next time.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.folders import cache_folder, cached_folder
from infer_align.errors import ConfigError

MAGIC = b"GGUF"
# Older versions count in 32 bits. A file of the other byte order has a huge version.
VERSIONS = (2, 3)
# A folder with one of these holds a model that transformers loads itself.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Part of the name of each entry in the cache. Another number makes all entries again.
FORM = 2
# Tokens that end a turn in common chat templates.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|call|>")
# The image encoder of a multimodal model lies beside its GGUF file under a name like this.
PROJECTOR = "mmproj"


def find_gguf(model: str, field: str) -> Path | None:
    """Return the GGUF file that a model's name stands for, or None.

    The name is that of a GGUF file, or of a folder with one GGUF file and no other weights.

    Raises:
        ConfigError: there is no such file, it is not a GGUF file, or the folder holds several.
    """
    path = Path(model)
    if path.is_dir():
        return _only_gguf(path, field)
    if not path.is_file():
        if path.suffix == ".gguf":
            raise ConfigError(f"{field}: {model!r}: there is no such file. Correct the path.")
        return None
    _check_header(path, field)
    return path


def _only_gguf(folder: Path, field: str) -> Path | None:
    if any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return None
    files = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith(PROJECTOR))
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(
            f"{field}: {str(folder)!r} holds several GGUF files: {names}. "
            f"Name one of them, such as {str(files[0])!r}."
        )
    _check_header(files[0], field)
    return files[0]


def _check_header(file: Path, field: str) -> None:
    with file.open("rb") as stream:
        header = stream.read(8)
    if header[:4] != MAGIC:
        raise ConfigError(
            f"{field}: {str(file)!r} is not a GGUF file. Name a GGUF file, or the folder of a "
            "model with its config.json."
        )
    version = struct.unpack("<I", header[4:].ljust(4, b"\0"))[0]
    if version not in VERSIONS:
        raise ConfigError(
            f"{field}: {str(file)!r} has the GGUF version {version}; 2 and 3 can be read. "
            "Convert the model again with a current llama.cpp."
        )


def convert_gguf(file: Path, dtype: str, field: str, progress: Callable[[str], None]) -> Path:
    """Return a folder with the model of a GGUF file as safetensors, and its tokenizer.

    The first call unpacks the file, which takes time and memory. Later calls find the folder in
    the cache.

    Args:
        file: the GGUF file.
        dtype: the torch type of the unpacked weights; "auto" is bfloat16.
        field: the configuration field that names the file.
        progress: called with a short text before the file is unpacked.

    Raises:
        ConfigError: the file is damaged, has an architecture that transformers does not read, or
            there is no room for the folder.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    size = file.stat().st_size

    def make(folder: Path) -> None:
        progress(f"unpacking {file.name} ({size / 1e6:,.0f} MB); the next start finds it unpacked")
        lm, tokenizer = _unpack(file, dtype, field)
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    version = f"{transformers.__version__}-{FORM}"
    key = f"gguf/{file.stem}-{digest[:16]}-{dtype}-transformers-{version}"
    try:
        return cached_folder(key, make)
    except (OSError, RuntimeError) as error:
        raise ConfigError(_cannot_write(file, field, error)) from error


def _cannot_write(file: Path, field: str, error: Exception) -> str:
    # safetensors reports a full disk as an error of its own, with the text of the system.
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    fix = "Free some space there" if full else "Let it be written"
    return (
        f"{field}: {str(file)!r} cannot be unpacked into {str(cache_folder())!r}: {error}. "
        f"{fix}, or name another folder with the environment variable XDG_CACHE_HOME."
    )


def _unpack(file: Path, dtype: str, field: str) -> tuple[Any, Any]:
    """Read a GGUF file into a plain model and a tokenizer."""
    folder = file.parent
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        # Only a GGUF file needs the package.
        from gguf import GGUFReader  # noqa: PLC0415

        fields = GGUFReader(file).fields
        _set_beginning(tokenizer, fields)
        lm, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # The readers of gguf and transformers meet a damaged file with any kind of error.
    except Exception as error:
        raise ConfigError(
            f"{field}: {str(file)!r} cannot be read as a GGUF model: {type(error).__name__}: "
            f"{error}. If the file is damaged or incomplete, download it again. If transformers "
            f"{transformers.__version__} does not know its architecture, use the model's "
            "safetensors."
        ) from error
    check_complete(field, str(file), "causal language model", loading)
    # The unpacked model is a plain one. Marks of its quantization would keep it from being saved.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        lm.__dict__.pop(mark, None)
    lm.config.__dict__.pop("quantization_config", None)
    _set_ends(lm, tokenizer, fields)
    return lm, tokenizer


def _set_beginning(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Let the tokenizer begin a text with the token that the file asks for, or with none.

    transformers does not read this. Models such as Gemma write nonsense without their token.
    """
    stated = fields.get("tokenizer.ggml.add_bos_token")
    model = fields.get("tokenizer.ggml.model")
    if stated is not None:
        begins = bool(stated.contents())
    elif model is not None and model.contents() == "llama":
        # What llama.cpp takes for a SentencePiece vocabulary.
        begins = True
    else:
        return
    if tokenizer.bos_token is not None:
        tokenizer.add_bos_token = begins


def _set_ends(lm: Any, tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Let the model end at every token that ends a text or a turn, as llama.cpp does.

    transformers reads the end of a text alone. A chat model would go on with the user's turn.
    """
    ends: set[int] = set()
    for name in ("eos", "eot", "eom"):
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            ends.add(int(field.contents()))
    # Older files do not name the end of a turn.
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[text] for text in TURN_ENDS if text in vocabulary}
    if "<|return|>" in vocabulary:
        # gpt-oss ends each message of a turn with <|end|>: its thoughts, too.
        ends.discard(vocabulary.get("<|end|>"))
    if ends:
        lm.generation_config.eos_token_id = sorted(ends)
