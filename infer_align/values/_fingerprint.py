"""A fingerprint of a model's weights: some of its numbers, by which a copy is recognised.

A head that was fitted on one model steers another of the same size and tokenizer at random. So a
head stores the fingerprint of its model, and is refused on a model with another one.

Every engine can compute it, whatever the type of its weights and however it arranges them:

* The numbers are rounded to bfloat16. Copies in float32, float16 and bfloat16 then differ by one
  unit of the last place at most.
* They are taken where vLLM keeps the layout of transformers, also if it joins the projections of
  an attention layer, or holds a part of each matrix on each GPU.
* Only the parts that both engines can read are compared. Quantised matrices are not read. On CPUs,
  vLLM packs the matrices of its layers, so the embedding and the norm are compared there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch

# {part of the model: numbers}
Fingerprint: TypeAlias = Mapping[str, list[float]]

NUMBERS = 32  # per part
EMBEDDING_ROWS = 64  # the rows from which numbers are taken; the first GPU holds them
# One unit of the last place of bfloat16, and the smallest number that float16 still tells from 0.
RELATIVE_TOLERANCE = 2.0**-7
ABSOLUTE_TOLERANCE = 1e-7
READABLE = {torch.float32, torch.float16, torch.bfloat16}

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$"
)
_NORM = re.compile(r"(^|\.)(norm|ln_f|norm_f|final_layernorm|final_layer_norm)\.weight$")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_QUERY = re.compile(r"\.(q_proj|qkv_proj)\.weight$")
_DOWN = re.compile(r"\.mlp\.down_proj\.weight$")
# Weights of other parts of a model that also reads images or sound.
_OTHER_MODALITY = re.compile(r"vision|visual|image|audio|speech")


def fingerprint(parameters: Iterable[tuple[str, torch.Tensor]]) -> Fingerprint:
    """Return the fingerprint of a model.

    Args:
        parameters: names and weights, as `named_parameters()` gives them in transformers and vLLM.

    Returns:
        Numbers of the input embedding, of the last norm, and of the last layer's query and down
        projections, under these names. Parts that are missing or quantised are left out.
    """
    parts: dict[str, list[float]] = {}
    last_layer = -1
    for name, weight in parameters:
        if weight.dtype not in READABLE or weight.is_meta or _OTHER_MODALITY.search(name):
            continue
        layer = _LAYER.search(name)
        if layer is not None:
            index = int(layer[1])
            last_layer = max(last_layer, index)
            parts.update(_layer_part(index, name, weight))
        elif _EMBEDDING.search(name):
            parts.setdefault("embedding", _spread(weight[:EMBEDDING_ROWS]))
        elif _NORM.search(name) and weight.dim() == 1:
            parts["norm"] = _spread(weight)
    ends = ("embedding", "norm", f"layer {last_layer} ")
    return {name: numbers for name, numbers in parts.items() if name.startswith(ends)}


def to_json(value: Fingerprint) -> str:
    """Write a fingerprint for the metadata of a file."""
    return json.dumps(value, sort_keys=True)


def from_json(text: str) -> Fingerprint:
    """Read a fingerprint.

    Raises:
        ValueError: the text is not a fingerprint.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a fingerprint")
    fingerprint: dict[str, list[float]] = {}
    for name, numbers in value.items():
        fingerprint[str(name)] = [float(number) for number in numbers]
    return fingerprint


def digest(value: Fingerprint) -> str:
    """Return a short name of a fingerprint, for messages."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:12]


def different_parts(first: Fingerprint, second: Fingerprint) -> list[str] | None:
    """Return the parts in which two models differ; None if they have no part in common."""
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    return [name for name in common if not _equal(first[name], second[name])]


def _equal(first: list[float], second: list[float]) -> bool:
    if len(first) != len(second):
        return False
    return torch.allclose(
        torch.tensor(first), torch.tensor(second), RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE
    )


def _layer_part(index: int, name: str, weight: torch.Tensor) -> dict[str, list[float]]:
    """Return the first numbers of the first row of a projection; {} for other weights.

    Joined projections begin with the query's rows, and a shard of the down projection with its
    first columns.
    """
    if weight.dim() != 2 or not weight.numel():
        return {}
    if _QUERY.search(name):
        return {f"layer {index} query": _numbers(weight[0, :NUMBERS])}
    if _DOWN.search(name):
        return {f"layer {index} down": _numbers(weight[0, :NUMBERS])}
    return {}


def _spread(weight: torch.Tensor) -> list[float]:
    """Return evenly spaced numbers of a tensor."""
    flat = weight.detach().reshape(-1)
    indices = torch.linspace(0, len(flat) - 1, min(NUMBERS, len(flat)), dtype=torch.float64)
    return _numbers(flat[indices.long().to(flat.device)])


def _numbers(weights: torch.Tensor) -> list[float]:
    numbers: list[float] = weights.detach().to(torch.bfloat16).double().cpu().tolist()
    return numbers
