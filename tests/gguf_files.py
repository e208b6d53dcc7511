"""Write a tiny Llama as a GGUF file, with the library of llama.cpp."""

# ruff: noqa: PLC0415 - torch is loaded by the tests that want it
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_gguf(
    file: Path,
    folder: Path,
    architecture: str = "llama",
    without: str = "",
    *,
    begins: bool | None = None,
    turn_end: int | None = None,
    pad: str = "<pad>",
    end: str = "</s>",
) -> None:
    """Write the model of a folder to a GGUF file; a weight may be left out.

    `begins` is what the file says about a token at the beginning of a text, and `turn_end` about
    the one at the end of a turn; None for nothing. `pad` and `end` are the texts of these tokens.
    """
    from gguf import GGUFWriter
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, AutoTokenizer.from_pretrained(folder), pad, end)
    if begins is not None:
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(begins)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in state.items():
        if name != without:
            writer.add_tensor(_gguf_name(name), _interleaved(name, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: Any, tokenizer: Any, pad: str, end: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pad, end, *vocabulary[2:]])
    writer.add_token_types([3, 3, *[1] * (len(vocabulary) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        name = name.replace(ours, theirs)
    return name


def _interleaved(name: str, weight: Any, config: Any) -> Any:
    """Order the rows of queries and keys as llama.cpp rotates them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if projection in name:
            rows, columns = weight.shape
            halves = weight.reshape(count, 2, rows // count // 2, columns)
            return halves.transpose(1, 2).reshape(rows, columns).contiguous()
    return weight
