"""config.json of Hugging Face checkpoints → the fields of our own model's config.

Every field that changes what is computed is read or, where our model does not compute it, refused by name; fields that
only concern training, caching or the file itself are passed over. Meanings: transformers' configuration classes and the
models' released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.numbers import LARGEST, finite
from moec.frontend.checkpoints.rope_config import read_rope

# said by the file, of no effect on inference
_PASSED_OVER = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache",
    "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "pretraining_tp", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "auto_map", "_name_or_path", "id2label", "label2id",
    "return_dict", "output_attentions", "output_hidden_states", "quantization_config", "is_decoder",
    "chunk_size_feed_forward", "problem_type", "is_encoder_decoder", "unsloth_fixed", "max_sequence_length",
    "_attn_implementation_autoset", "qk_head_dim",
}  # fmt: skip


@dataclass
class Reading:
    """One config.json being read: values with their types checked, every complaint kept, and what was not read.
    `absent`: what the architecture means by fields that are not there, where that is not what most mean."""

    data: Mapping[str, Any]
    problems: Problems
    absent: Mapping[str, Any] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def value(self, name: str, default: Any = None) -> Any:
        """What the config says, None for null; where it says nothing, what `absent` does, else the default."""
        self._used.add(name)
        return self.data[name] if name in self.data else self.absent.get(name, default)

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; without a default it must be there."""
        value = self.value(name, default)
        if type(value) is not int or not least <= value <= LARGEST:
            if value is None and name not in self.data:
                self.problems.add(f"config.json: {name} is missing")
            else:
                limit = f"at least {least}" if type(value) is not int or value < least else f"at most {LARGEST}"
                self.problems.add(f"config.json: {name} is {_shown(value)}, expected a whole number of {limit}")
            return max(least, default or 0)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.value(name, default)
        number = finite(value)
        if number is None:
            self.problems.add(f"config.json: {name} is {_shown(value)}, expected a number")
            return default
        return number

    def flag(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool):
            self.problems.add(f"config.json: {name} is {_shown(value)}, expected true or false")
            return default
        return value

    def must_be(self, name: str, *allowed: Any, default: Any = None) -> None:
        """Refuse a field that says anything but what our model computes."""
        value = self.value(name, allowed[0] if default is None else default)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            wanted = " or ".join(map(repr, allowed))
            self.problems.add(f"config.json: {name} is {value!r}, which is not supported (supported: {wanted})")

    def passes_over(self, *names: str) -> None:
        self._used.update(names)

    def finish(self) -> None:
        """Refuse what nothing has read: it could change what is computed."""
        for name in sorted(self.data.keys() - self._used - _PASSED_OVER):
            self.problems.add(
                f"config.json: {name} is {self.data[name]!r}, a field that this architecture does not have"
            )


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _common(r: Reading) -> dict[str, Any]:
    r.must_be("hidden_act", "silu")
    fields = {
        "vocab_size": r.integer("vocab_size"),
        "hidden_size": r.integer("hidden_size"),
        "num_layers": r.integer("num_hidden_layers"),
        "num_heads": r.integer("num_attention_heads"),
        "rms_norm_eps": r.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": r.flag("tie_word_embeddings", False),
        "max_position": r.integer("max_position_embeddings"),
    }
    return fields | read_rope(r)


def _grouped_query(r: Reading, fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["num_heads"]
    head_dim = r.value("head_dim")
    if head_dim is None and fields["hidden_size"] % heads:
        r.problems.add(f"config.json: hidden_size {fields['hidden_size']} is no multiple of {heads} heads")
    head_dim = fields["hidden_size"] // heads if head_dim is None else r.integer("head_dim")
    num_kv_heads = heads if r.value("num_key_value_heads") is None else r.integer("num_key_value_heads")
    return {"num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _dense(r: Reading, fields: dict[str, Any]) -> dict[str, Any]:
    return {"first_k_dense": fields["num_layers"], "intermediate_size": r.integer("intermediate_size")}


def _attention_bias(r: Reading) -> dict[str, Any]:
    bias = r.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _llama(r: Reading) -> dict[str, Any]:
    fields = _common(r)
    r.must_be("mlp_bias", False)
    return fields | _grouped_query(r, fields) | _dense(r, fields) | _attention_bias(r)


def _qwen2(r: Reading) -> dict[str, Any]:
    fields = _common(r)
    fields |= _grouped_query(r, fields) | _dense(r, fields) | {"qkv_bias": True}
    r.must_be("use_mrope", False)
    window, first = r.value("sliding_window"), r.integer("max_window_layers", 28, least=0)
    types = r.value("layer_types")
    if not r.flag("use_sliding_window", False):
        window = None
    if types is None:
        count = fields["num_layers"]
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(count)]
    return fields | _windows(r, fields, window, types)


def _windows(r: Reading, fields: dict[str, Any], window: Any, types: Any) -> dict[str, Any]:
    """layer_types: full attention in the first layers, the window in the others, is what our model computes."""
    full = types.count("full_attention") if isinstance(types, list) else -1
    count = fields["num_layers"]
    if types != ["full_attention"] * full + ["sliding_attention"] * (count - full):
        r.problems.add(
            f"config.json: layer_types is {types!r}, supported are {count} entries: layers of 'full_attention', then "
            "layers of 'sliding_attention'"
        )
        return {}
    if full == count:
        return {}
    if window is None:
        r.problems.add("config.json: layer_types has layers of 'sliding_attention', and there is no sliding window")
        return {}
    return {"sliding_window": r.integer("sliding_window"), "full_attention_layers": full}


def _mixtral(r: Reading) -> dict[str, Any]:
    fields = _common(r)
    window = r.value("sliding_window")
    return (
        fields
        | _grouped_query(r, fields)
        | {
            "num_experts": r.integer("num_local_experts", 8),
            "top_k": r.integer("num_experts_per_tok", 2),
            "moe_intermediate_size": r.integer("intermediate_size"),
        }
        | ({} if window is None else {"sliding_window": r.integer("sliding_window")})
    )


def _qwen3_moe(r: Reading) -> dict[str, Any]:
    fields = _common(r)
    layers = fields["num_layers"]
    experts = "num_local_experts" if r.data.get("num_experts") is None else "num_experts"
    if r.flag("use_sliding_window", False):
        fields["sliding_window"] = r.integer("sliding_window")
    # transformers passes the window of this architecture to every layer
    r.passes_over("sliding_window", "max_window_layers", "num_experts", "num_local_experts")
    return (
        fields
        | _grouped_query(r, fields)
        | _attention_bias(r)
        | {
            "qk_norm": True,
            "num_experts": r.integer(experts),
            "top_k": r.integer("num_experts_per_tok"),
            "moe_intermediate_size": r.integer("moe_intermediate_size"),
            "norm_topk_prob": r.flag("norm_topk_prob", False),
            "first_k_dense": _first_dense(r, layers),
            "intermediate_size": r.integer("intermediate_size"),
        }
    )


def _first_dense(r: Reading, layers: int) -> int:
    """How many of the first layers are dense; others may not be."""
    step, only = r.integer("decoder_sparse_step", 1), r.value("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(i) is not int for i in only):
        r.problems.add(f"config.json: mlp_only_layers is {only!r}, expected a list of layer numbers")
        only = []
    chosen = set(only)
    dense = [i for i in range(layers) if i in chosen or (i + 1) % step]
    if dense != list(range(len(dense))):
        r.problems.add(
            f"config.json: mlp_only_layers {only} and decoder_sparse_step {step} make the layers {dense} dense, "
            "supported are the first layers only"
        )
    return len(dense)


def _deepseek(r: Reading) -> dict[str, Any]:
    fields = _common(r)
    for name in ("attention_bias", "mlp_bias"):
        r.must_be(name, False)
    r.must_be("moe_layer_freq", 1)
    r.passes_over("num_key_value_heads", "head_dim")  # each head has keys of its own out of the latents
    layers = fields["num_layers"]
    fields |= {
        "first_k_dense": r.integer("first_k_dense_replace", least=0),
        "intermediate_size": r.integer("intermediate_size"),
        "moe_intermediate_size": r.integer("moe_intermediate_size"),
        "num_experts": r.integer("n_routed_experts"),
        "top_k": r.integer("num_experts_per_tok"),
        "num_shared_experts": r.integer("n_shared_experts", least=0),
        "routed_scaling_factor": r.number("routed_scaling_factor", 1.0),
        "q_lora_rank": None if r.value("q_lora_rank") is None else r.integer("q_lora_rank"),
        **{n: r.integer(n) for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    }
    if fields["first_k_dense"] >= layers:
        r.problems.add(f"config.json: first_k_dense_replace is {fields['first_k_dense']} of {layers} layers")
    return fields


def _deepseek_v2(r: Reading) -> dict[str, Any]:
    fields = _deepseek(r)
    r.must_be("scoring_func", "softmax")
    # with it, DeepSeek's released code leaves routed_scaling_factor out and transformers does not normalise
    r.must_be("norm_topk_prob", False)
    groups: dict[str, Any] = {}
    method = r.value("topk_method", "greedy")
    if method == "group_limited_greedy":
        groups = {"n_group": r.integer("n_group"), "topk_group": r.integer("topk_group")}
    elif method != "greedy":
        r.must_be("topk_method", "greedy", "group_limited_greedy")
    r.passes_over("n_group", "topk_group", "num_nextn_predict_layers")
    return fields | groups | {"norm_topk_prob": False, "rope_interleaved": True}


def _deepseek_v3(r: Reading) -> dict[str, Any]:
    fields = _deepseek(r)
    r.must_be("scoring_func", "sigmoid")
    r.must_be("topk_method", "noaux_tc")
    return fields | {
        "scoring": "sigmoid",
        "n_group": r.integer("n_group"),
        "topk_group": r.integer("topk_group"),
        "norm_topk_prob": r.flag("norm_topk_prob", True),
        "rope_interleaved": r.flag("rope_interleave", True),
        "num_mtp_layers": r.integer("num_nextn_predict_layers", least=0),
    }


# what transformers' configuration classes have for fields that a config.json leaves out; those without must be there
_DEEPSEEK_V3 = {
    "q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4, "num_nextn_predict_layers": 1,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, Callable[[Reading], dict[str, Any]], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _llama, {}),
    "qwen2": ("Qwen2ForCausalLM", _qwen2, {"num_key_value_heads": 32}),
    "mixtral": ("MixtralForCausalLM", _mixtral, {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe, {"num_key_value_heads": 4, "intermediate_size": 6144}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        _deepseek_v2,
        {"q_lora_rank": 1536, "n_shared_experts": 2, "first_k_dense_replace": 0},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _deepseek_v3, _DEEPSEEK_V3),
}


def read_config(data: Mapping[str, Any], problems: Problems) -> tuple[str, dict[str, Any]]:
    """(model_type, fields of `moec.models.ModelConfig`) of a config.json. Complaints go to `problems`; an unknown
    architecture is one that nothing else can be said about."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(f"{k} ({name})" for k, (name, *_) in ARCHITECTURES.items())
        problems.add(f"config.json: model_type is {kind!r}, supported are {known}")
        problems.stop()
    name, read, absent = ARCHITECTURES[str(kind)]
    said = data.get("architectures")
    if said is not None and said != [name]:
        problems.add(f"config.json: architectures is {said!r}, supported for {kind} is {[name]}")
    reading = Reading(data, problems, absent)
    fields = read(reading)
    reading.finish()
    return str(kind), fields
