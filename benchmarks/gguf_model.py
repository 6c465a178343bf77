"""Convert a Hugging Face folder of minigpt to GGUF, for llama.cpp.

    python gguf_model.py FOLDER OUT.gguf F32|BF16|Q8_0

A separate script, because it runs in the Python that has llama.cpp, which needs gguf, safetensors
and numpy, but not torch. The file contains no vocabulary: prompts are ids.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array = npt.NDArray[np.float32]

_GPT2_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}
_QWEN3_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def gguf_tensors(config: dict[str, Any], tensors: dict[str, Array]) -> dict[str, Array]:
    """Return the tensors under llama.cpp's names, each matrix as (out, in)."""
    is_gpt2 = config["model_type"] == "gpt2"
    names = _GPT2_NAMES if is_gpt2 else _QWEN3_NAMES
    renamed = {}
    for full_name, tensor in tensors.items():
        name, kind = full_name.removeprefix("transformer.").removeprefix("model.").rsplit(".", 1)
        block = ""
        if name.startswith(("h.", "layers.")):
            _, layer, name = name.split(".", 2)
            block = f"blk.{layer}."
        # GPT-2's projections are stored as (in, out).
        is_transposed = is_gpt2 and block and tensor.ndim == 2
        renamed[f"{block}{names[name]}.{kind}"] = tensor.T.copy() if is_transposed else tensor
    return renamed


def write(folder: Path, out: Path, type_name: str) -> None:
    """Write the file: matrices are quantized; norms, biases and positions stay in float32."""
    config = json.loads((folder / "config.json").read_text())
    is_gpt2 = config["model_type"] == "gpt2"
    writer = gguf.GGUFWriter(str(out), config["model_type"])
    (_write_gpt2_shape if is_gpt2 else _write_qwen3_shape)(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(
        gguf.LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"]
    )
    kind = gguf.GGMLQuantizationType[type_name]
    for name, tensor in gguf_tensors(config, load_file(folder / "model.safetensors")).items():
        if tensor.ndim < 2 or name.startswith("position_embd") or type_name == "F32":
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gpt2_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _write_qwen3_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
