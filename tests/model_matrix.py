"""The model matrix: small random models of many families, traced with dynamic sizes and stored as text.

`tests/graphs/<name>.ir` holds what the front end gives for each entry of `MATRIX` (structure, locations, weights by
name and type), so that every pass meets every form without a model being built. `make graphs` traces them again;
`graphs()` lists the names, `load(name)` reads one with random weights, `traced(name)` traces it afresh.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import moec.models
from moec.decoder import cached_decoder, example
from moec.frontend import trace
from moec.ir import CompileError, Graph, TensorType, parse

FOLDER = Path(__file__).parent / "graphs"

# given to every config that takes the name; sizes differ from each other wherever a family allows it
COMMON: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_hidden_layers": 1, "moe_intermediate_size": 24, "num_experts": 6,
    "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6, "num_experts_per_tok": 3, "moe_topk": 3,
    "moe_k": 3, "shared_expert_intermediate_size": 28, "shared_intermediate_size": 28, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE_HEADS = {"head_dim": 16}
SPARSE = {"mlp_layer_types": ["sparse"]}
TWO_LAYERS = {"num_hidden_layers": 2}
DENSE_FIRST = TWO_LAYERS | {"first_k_dense_replace": 1}
WINDOW_THEN_FULL = TWO_LAYERS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# DeepSeek's latent attention, with as many key heads as query heads
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "head_dim": 8, "n_group": 3, "topk_group": 2,
}  # fmt: skip
LINEAR_THEN_FULL = WIDE_HEADS | TWO_LAYERS | {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 20, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}


@dataclass(frozen=True)
class Family:
    """A transformers config class, what it needs beyond COMMON, and its attention implementations."""

    config: str
    values: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ("sdpa", "eager")
    experts: bool = True  # whether transformers lets the experts' implementation be chosen


EAGER = ("eager",)
FAMILIES: dict[str, Family] = {
    "mixtral": Family("MixtralConfig"),
    "qwen2_moe": Family("Qwen2MoeConfig", TWO_LAYERS | {"decoder_sparse_step": 2}),
    "qwen3_moe": Family("Qwen3MoeConfig", WIDE_HEADS | {"norm_topk_prob": True}),
    "deepseek_v2": Family("DeepseekV2Config", LATENT | DENSE_FIRST | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": Family("DeepseekV3Config", LATENT | DENSE_FIRST),
    "gpt_oss": Family("GptOssConfig", WIDE_HEADS | TWO_LAYERS | {"sliding_window": 8}, EAGER),
    "olmoe": Family("OlmoeConfig"),
    "granitemoe": Family(
        "GraniteMoeConfig",
        {"attention_multiplier": 0.3, "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22},
    ),
    "granitemoeshared": Family("GraniteMoeSharedConfig", {"attention_multiplier": 0.3}),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig", {"layer_types": ["attention"], "mamba_n_heads": 4, "attention_multiplier": 0.3}
    ),
    "phimoe": Family("PhimoeConfig", {"num_experts_per_tok": 2}),
    "jetmoe": Family("JetMoeConfig", {"kv_channels": 12}, experts=False),
    "llama4": Family(
        "Llama4TextConfig",
        WIDE_HEADS
        | TWO_LAYERS
        | {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 56,
            "intermediate_size": 24,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        },
        experts=False,
    ),
    "glm4_moe": Family("Glm4MoeConfig", WIDE_HEADS | DENSE_FIRST | {"use_qk_norm": True}),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", LATENT | SPARSE),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", TWO_LAYERS | {"moe_layer_start_index": 1, "moe_layer_end_index": 1}),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", WIDE_HEADS),
    "dots1": Family("Dots1Config", DENSE_FIRST),
    "minimax": Family("MiniMaxConfig", WIDE_HEADS | TWO_LAYERS | {"block_size": 8}),
    "minimax_m2": Family("MiniMaxM2Config", WIDE_HEADS),
    "qwen3_next": Family("Qwen3NextConfig", LINEAR_THEN_FULL),
    "qwen3_5_moe": Family("Qwen3_5MoeTextConfig", LINEAR_THEN_FULL),
    "jamba": Family(
        "JambaConfig",
        TWO_LAYERS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "dbrx": Family(
        "DbrxConfig",
        {
            "d_model": 40,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3},
        },
        experts=False,
    ),
    "flex_olmo": Family("FlexOlmoConfig"),
    "lfm2_moe": Family(
        "Lfm2MoeConfig", TWO_LAYERS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
    ),
    "afmoe": Family(
        "AfmoeConfig",
        WIDE_HEADS | TWO_LAYERS | {"num_dense_layers": 1, "sliding_window": 8, "global_attn_every_n_layers": 2},
    ),
    "cohere2_moe": Family("Cohere2MoeConfig", WIDE_HEADS | WINDOW_THEN_FULL),
    "exaone_moe": Family("ExaoneMoeConfig", WINDOW_THEN_FULL),
    "solar_open": Family("SolarOpenConfig", WIDE_HEADS),
    "longcat_flash": Family(
        "LongcatFlashConfig",
        LATENT | {"num_layers": 1, "ffn_hidden_size": 56, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
        experts=False,
    ),
    "mimo_v2_flash": Family("MiMoV2FlashConfig", WIDE_HEADS | WINDOW_THEN_FULL | {"v_head_dim": 12}, EAGER),
    "hy_v3": Family("HYV3Config", WIDE_HEADS | SPARSE),
    "laguna": Family("LagunaConfig", WIDE_HEADS | SPARSE),
    "nemotron_h": Family(
        "NemotronHConfig",
        WIDE_HEADS | {"layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 28},
    ),
    "granitemoehybrid_mamba": Family(
        "GraniteMoeHybridConfig",
        TWO_LAYERS | MAMBA2 | {"layer_types": ["mamba", "attention"], "attention_multiplier": 0.3},
    ),
    "nemotron_h_mamba": Family(
        "NemotronHConfig",
        WIDE_HEADS
        | {
            "layers_block_type": ["mamba", "moe", "attention"],
            "moe_shared_expert_intermediate_size": 28,
            "mamba_num_heads": 4,
            "mamba_head_dim": 20,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "mellum": Family("MellumConfig", WIDE_HEADS | {"sliding_window": 8}),
    "aria_text": Family("AriaTextConfig"),
    "bamba": Family("BambaConfig", TWO_LAYERS | MAMBA2 | {"attn_layer_indices": [1]}, experts=False),
    "mamba": Family("MambaConfig", {"state_size": 8, "time_step_rank": 4}, EAGER, experts=False),
    "mamba2": Family(
        "Mamba2Config",
        {"state_size": 8, "num_heads": 4, "head_dim": 20, "n_groups": 2, "chunk_size": 8},
        EAGER,
        experts=False,
    ),
    "llama": Family("LlamaConfig", TWO_LAYERS, experts=False),
    "llama_yarn": Family(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        experts=False,
    ),
    "gpt2": Family(
        "GPT2Config", {"n_embd": 40, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 56}, experts=False
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, experts=False
    ),
    "gemma2": Family("Gemma2Config", WIDE_HEADS | WINDOW_THEN_FULL, EAGER, experts=False),
    "gemma3": Family("Gemma3TextConfig", WIDE_HEADS | WINDOW_THEN_FULL, experts=False),
    "phi3": Family("Phi3Config", experts=False),
    "phi": Family("PhiConfig", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, experts=False),
    "qwen2": Family("Qwen2Config", experts=False),
    "cohere": Family("CohereConfig", {"use_qk_norm": True}, experts=False),
    "glm4": Family(
        "Glm4Config", WIDE_HEADS | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, experts=False
    ),
    "smollm3": Family("SmolLM3Config", TWO_LAYERS | {"no_rope_layers": [1, 0]}, experts=False),
}
OWN = {
    "own_deepseek_v3": "deepseek-v3-mini",
    "own_deepseek_v2_lite": "deepseek-v2-lite-mini",
    "own_mixtral": "mixtral-8x7b-mini",
    "own_qwen3": "qwen3-30b-a3b-mini",
}

# families that the front end refuses, with the reason
REFUSED: dict[str, str] = {}


@dataclass(frozen=True)
class Entry:
    """One stored graph. `call`: "prefill" (ids only), "masked" (ids and attention_mask), "decode" (ids, mask of past
    and new tokens, and the cache)."""

    family: str
    attention: str = "sdpa"
    experts: str | None = None
    call: str = "prefill"
    dtype: str = "f32"

    @property
    def name(self) -> str:
        parts = [self.family, self.attention, (self.experts or "").removesuffix("_mm"), self.call]
        return ".".join(p for p in [*parts, "" if self.dtype == "f32" else self.dtype] if p)


def build(entry: Entry, positions: int | None = None) -> torch.nn.Module:
    """The model of an entry, with random weights; `positions`: how many it is made for, if not those of COMMON."""
    torch.manual_seed(0)
    if entry.family in OWN:
        config = moec.models.config(OWN[entry.family])
        dense = min(config.first_k_dense, 1)
        small = dataclasses.replace(config, num_layers=1 + dense, first_k_dense=dense, vocab_size=29)
        return moec.models.build(small).to(_DTYPES[entry.dtype])
    family = FAMILIES[entry.family]
    config_class = getattr(transformers, family.config)
    known = inspect.signature(config_class.__init__).parameters
    longer = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), positions) if positions else {}
    values = COMMON | family.values | longer
    config = config_class(**{k: v for k, v in values.items() if k in known or k in family.values})
    extra = {"experts_implementation": entry.experts} if entry.experts else {}
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=entry.attention, dtype=_DTYPES[entry.dtype], **extra
    )
    for p in model.parameters():
        if p.dim() > 1 and not p.any():  # a router of zeros ties all experts, and ties are broken differently
            torch.nn.init.normal_(p, std=0.02)
    return model.eval()


_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def call(entry: Entry, model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, Any]]:
    """What to trace, and the arguments of `moec.frontend.trace`."""
    if entry.call == "decode":
        decoder, past_of = cached_decoder(model)
        args, shapes = example(past_of)
        return decoder, {"args": args, "dynamic_shapes": shapes}
    kwargs: dict[str, Any] = {"input_ids": torch.randint(3, 29, (2, 12))}
    shapes = {"input_ids": {0: "B", 1: "S"}}
    if entry.call == "masked":
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :4] = 0
        kwargs["attention_mask"], shapes["attention_mask"] = mask, {0: "B", 1: "S"}
    if entry.family not in OWN:
        kwargs["use_cache"] = False
    return model, {"kwargs": kwargs, "dynamic_shapes": shapes}


# a cache of past tokens (or states) as inputs and outputs, and narrow floats: for a few families each
DECODED = (
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe", "granitemoe", "llama", "phi3",
    "qwen3_next", "granitemoehybrid_mamba",
)  # fmt: skip
BFLOAT16 = (
    Entry("mixtral", "sdpa", "grouped_mm", dtype="bf16"),
    Entry("qwen3_moe", "eager", "batched_mm", "masked", "bf16"),
    Entry("deepseek_v3", "sdpa", "grouped_mm", dtype="bf16"),
    Entry("gpt_oss", "eager", "grouped_mm", dtype="bf16"),
    Entry("llama4", dtype="bf16"),
    Entry("gemma2", "eager", call="masked", dtype="bf16"),
    Entry("gpt_neox", dtype="bf16"),
    Entry("own_mixtral", dtype="bf16"),
    Entry("own_deepseek_v3", call="decode", dtype="bf16"),
)


def _matrix() -> dict[str, Entry]:
    entries = [Entry(f, call=c) for f in OWN for c in ("prefill", "decode")]
    for name, family in FAMILIES.items():
        if name in REFUSED:
            continue
        grouped, batched = ("grouped_mm", "batched_mm") if family.experts else (None, None)
        entries.append(Entry(name, family.attention[0], grouped))
        entries.append(Entry(name, "eager", batched, "masked"))
        if name in DECODED:
            entries.append(Entry(name, "sdpa", grouped, "decode"))
    return {e.name: e for e in (*entries, *BFLOAT16)}


MATRIX = _matrix()


def traced(name: str, check: bool = False) -> Graph:
    """The entry's graph as the front end gives it today; with `check`, compared with the model at other sizes."""
    entry = MATRIX[name]
    module, arguments = call(entry, build(entry))
    return trace(module, check=check, **arguments).graph


def graphs(pattern: str = "*") -> list[str]:
    """Names of the stored graphs, those that match a glob pattern."""
    return sorted(p.name.removesuffix(".ir") for p in FOLDER.glob(f"{pattern}.ir"))


def load(name: str, *, weights: bool = True) -> Graph:
    """A stored graph; with `weights`, random ones of about unit gain from a seed per name (norms near 1)."""
    graph = parse((FOLDER / f"{name}.ir").read_text())
    if weights:
        graph.bind_weights({w: _random(w, v.type) for w, v in graph.weights.items()})
    return graph


def _random(name: str, type: TensorType) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = [int(s) for s in type.shape]
    if not type.dtype.is_float:
        return torch.zeros(shape, dtype=type.dtype.torch)
    x = torch.randn(shape, generator=generator)
    x = 1 + 0.1 * x if len(shape) < 2 else x / shape[-1] ** 0.5
    return x.to(type.dtype.torch)


def main(arguments: list[str]) -> int:
    """Trace the entries whose names hold one of `arguments` (all without), and write them. The number that failed."""
    check = "--check" in arguments
    wanted = [a for a in arguments if not a.startswith("-")]
    FOLDER.mkdir(exist_ok=True)
    failed = 0
    for name in MATRIX:
        if wanted and not any(w in name for w in wanted):
            continue
        start = time.perf_counter()
        try:
            text = str(traced(name, check))
        except (CompileError, ValueError, RuntimeError) as e:  # one family that fails does not stop the others
            failed += 1
            print(f"{name}: {type(e).__name__}: {str(e).splitlines()[0]}", flush=True)
            continue
        (FOLDER / f"{name}.ir").write_text(text)
        print(f"{name}: {len(text) // 1024} KiB, {time.perf_counter() - start:.1f} s", flush=True)
    if not wanted:
        for path in FOLDER.glob("*.ir"):
            if path.stem not in MATRIX:
                path.unlink()
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
