"""llama.cpp as a peer of the CPU figures: the models as GGUF files in f32, run through llama-cpp-python's C functions.

Each row of a batch is a sequence of its own; the cache, which it always has, is emptied before each call.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import torch

CONTEXT = 1024  # tokens of all sequences
SEQUENCES = 8
SIGMOID = 2  # expert_gating_func


def write(path: Path, model: Any) -> Path:
    """transformers' DeepSeek-V3 or Qwen3-MoE as llama.cpp's converter lays it out, without a vocabulary."""
    c = model.config
    latent = c.model_type == "deepseek_v3"
    architecture = gguf.MODEL_ARCH.DEEPSEEK2 if latent else gguf.MODEL_ARCH.QWEN3MOE
    w = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("no_vocab")
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    if latent:
        width = c.kv_lora_rank + c.qk_rope_head_dim
        w.add_head_count_kv(1)  # the latents are the keys of all heads
        w.add_q_lora_rank(c.q_lora_rank)
        w.add_kv_lora_rank(c.kv_lora_rank)
        w.add_key_length(width)
        w.add_value_length(c.kv_lora_rank)
        w.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
        w.add_value_length_mla(c.v_head_dim)
        w.add_rope_dimension_count(c.qk_rope_head_dim)
        w.add_leading_dense_block_count(c.first_k_dense_replace)
        w.add_expert_count(c.n_routed_experts)
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_expert_group_count(c.n_group)
        w.add_expert_group_used_count(c.topk_group)
        w.add_expert_weights_scale(c.routed_scaling_factor)
        w.add_expert_weights_norm(c.norm_topk_prob)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType(SIGMOID))
    else:
        w.add_head_count_kv(c.num_key_value_heads)
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
        w.add_expert_count(c.num_experts)
    names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
    for name, t in model.state_dict().items():
        for key, part in _stored(name, t, c):
            found = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise KeyError(f"llama.cpp has no tensor for {key}")
            w.add_tensor(found, part.contiguous().float().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _stored(name: str, t: torch.Tensor, c: Any) -> list[tuple[str, torch.Tensor]]:
    """A tensor under the names, and in the parts, of the converter's tables."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = t.chunk(2, 1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", t)]
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("e_score_correction_bias", "e_score_correction.bias"), t)]
    if name.endswith("kv_b_proj.weight"):
        keys, values = t.reshape(c.num_attention_heads, -1, c.kv_lora_rank).split([c.qk_nope_head_dim, c.v_head_dim], 1)
        stem = name.removesuffix("kv_b_proj.weight")
        return [(f"{stem}k_b_proj.weight", keys.transpose(1, 2)), (f"{stem}v_b_proj.weight", values)]
    return [(name, t)]


class Runner:
    """Logits f32[B, S, vocabulary] of ids i64[B, S], which the next call overwrites; with `flash`, by its flash
    attention, which rounds to f16. Raises RuntimeError where llama.cpp fails."""

    def __init__(self, path: Path, threads: int, flash: bool = False):
        import llama_cpp as c

        self.library = c
        c.llama_backend_init()
        self.silent = c.llama_log_callback(lambda level, text, data: None)  # the library calls it as long as it is used
        c.llama_log_set(self.silent, ctypes.c_void_p(0))
        model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        wanted = c.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = CONTEXT, CONTEXT, CONTEXT
        wanted.n_seq_max, wanted.kv_unified = SEQUENCES, True
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        wanted.type_k = wanted.type_v = c.GGML_TYPE_F32
        self.context = c.llama_init_from_model(model, wanted)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context for {path}")
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        self.batch = c.llama_batch_init(CONTEXT, 0, 1)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        c, batch, length = self.library, self.batch, ids.shape[1]
        batch.n_tokens = ids.numel()
        for i, token in enumerate(ids.flatten().tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i % length, 1, True
            batch.seq_id[i][0] = i // length
        c.llama_memory_clear(c.llama_get_memory(self.context), False)
        if c.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        numbers = ctypes.POINTER(ctypes.c_float * (ids.numel() * self.vocabulary))
        found = ctypes.cast(c.llama_get_logits(self.context), numbers)
        return torch.frombuffer(found.contents, dtype=torch.float32).reshape(*ids.shape, self.vocabulary)
