"""Keep the rotary position factors of a model fixed, whatever else is in its batch.

transformers chooses the factors of two kinds of rotary positions by the longest sequence of each
forward pass: those of `longrope`, and those of `dynamic` beyond the trained length. The other rows
of a batch, and the keys that are already cached, would then be read with other factors. So an
engine chooses them once, by its context length, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LONGROPE = "longrope"
DYNAMIC = "dynamic"
# The kinds whose factors never change.
STATIC = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
# A position that is within the trained length of every model, for trying a model.
NEAR = 64


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of a text configuration, one per type of layer that has some."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [each for each in parameters.values() if isinstance(each, dict) and each]


def longest_context(config: Any) -> int | None:
    """Return the largest number of tokens that a model can read; None if it does not say.

    `dynamic` positions stretch the trained length by their factor.
    """
    maximum: int | None = getattr(config, "max_position_embeddings", None)
    if not maximum or maximum < 0:
        return None
    parameters = rope_parameters(config)
    stretched = bool(parameters) and all(each["rope_type"] == DYNAMIC for each in parameters)
    if not stretched:
        return maximum
    return int(maximum * min(float(each.get("factor") or 1) for each in parameters))


def longrope_lengths(config: Any) -> list[int]:
    """Return the lengths above which longrope takes its long factors, in ascending order."""
    lengths: set[int] = set()
    for parameters in rope_parameters(config):
        if parameters["rope_type"] == LONGROPE:
            lengths.add(int(parameters["original_max_position_embeddings"]))
    return sorted(lengths)


def by_rope_factors(config: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Group sequences that one forward pass reads with the factors that each has alone.

    Args:
        config: the text configuration of the model.
        lengths: number of tokens of each sequence.

    Returns:
        The indices of each group, in the order of `lengths`.
    """
    borders = longrope_lengths(config)
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        passed = sum(length > border for border in borders)
        groups.setdefault(passed, []).append(index)
    return list(groups.values())


def fix_rope(model: Any, context_length: int | None) -> None:
    """Choose the rotary factors of a loaded model once, by its context length.

    longrope takes its long factors if the context length exceeds the trained length, else its short
    ones. `dynamic` takes those of a sequence as long as the context. Other kinds stay as they are.

    Args:
        model: a transformers model. Its configuration is changed too.
        context_length: maximum number of tokens; None stands for the length that its configuration
            names.
    """
    config = model.config.get_text_config(decoder=True)
    length = context_length or getattr(config, "max_position_embeddings", None)
    if not length:
        return
    for parameters in rope_parameters(config):
        if parameters["rope_type"] == LONGROPE:
            _use_one_list_of_factors(parameters, length)
    is_stretched = length > (getattr(config, "max_position_embeddings", None) or length)
    for module in model.modules():
        for layer_type, kind in list(_rope_types(module)):
            if kind == LONGROPE or (kind == DYNAMIC and is_stretched):
                _set_frequencies(module, config, layer_type, length)
            if kind in {LONGROPE, DYNAMIC}:
                _make_static(module, layer_type)


def _use_one_list_of_factors(parameters: dict[str, Any], length: int) -> None:
    """Make the short and the long factors of longrope equal."""
    is_long = length > parameters["original_max_position_embeddings"]
    chosen = "long" if is_long else "short"
    for name in ("factor", "mscale"):
        value = parameters.get(f"{chosen}_{name}")
        if value is not None:
            parameters[f"short_{name}"] = value
            parameters[f"long_{name}"] = value


def _rope_types(module: Any) -> Iterator[tuple[str | None, str]]:
    """Yield the layer type and the kind of each set of frequencies that a module holds."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield None, kinds
    elif isinstance(kinds, dict):
        yield from kinds.items()


def _set_frequencies(module: Any, config: Any, layer_type: str | None, length: int) -> None:
    prefix = f"{layer_type}_" if layer_type else ""
    name = f"{prefix}inv_freq"
    buffer = getattr(module, name)
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    compute = ROPE_INIT_FUNCTIONS[kind]
    options = {"layer_type": layer_type} if layer_type else {}
    frequencies, scaling = compute(config, buffer.device, seq_len=length, **options)
    for buffer_name in (name, f"{prefix}original_inv_freq"):
        setattr(module, buffer_name, torch.nn.Buffer(frequencies.clone(), persistent=False))
    setattr(module, f"{prefix}attention_scaling", scaling)


def _make_static(module: Any, layer_type: str | None) -> None:
    """Let a module keep the frequencies that it has."""
    if layer_type is None:
        module.rope_type = "default"
    else:
        module.rope_type = {**module.rope_type, layer_type: "default"}


@torch.inference_mode()
def reads_rows_alone(model: Any, context_length: int) -> bool:
    """Return False if the position of one row changes how another row of the batch is read.

    Models whose rotary kinds are all static are not tried.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = {parameters["rope_type"] for parameters in rope_parameters(config)}
    if kinds <= STATIC:
        return True
    near = min([NEAR, context_length // 2, *(border // 2 for border in longrope_lengths(config))])
    logits = [_first_row_logits(model, near, other) for other in (near, context_length - 1)]
    change = (logits[1] - logits[0]).abs().max()
    return bool(change <= 1e-3 * logits[0].abs().max())


def _first_row_logits(model: Any, position: int, other: int) -> torch.Tensor:
    """Return the logits of a row of three tokens beside another row with other positions."""
    # The first ids of a vocabulary may be padding, whose embedding is zero.
    ids = torch.tensor([[2, 3, 4], [2, 3, 4]], device=model.device)
    positions = torch.tensor(
        [[0, position // 2, position], [0, position // 2, other]], device=model.device
    )
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0, -1].float()
    return logits
