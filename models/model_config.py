"""`ModelConfig`: every size and choice of a transformer, dense or with experts, validated on construction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al., arXiv:2309.00071) with DeepSeek's two mscale values.

    factor: new context / original context. beta_fast, beta_slow: numbers of full rotations over the original
    context above which a frequency is kept, and below which it is divided by `factor`. mscale, mscale_all_dim:
    cos and sin are multiplied by m(mscale) / m(mscale_all_dim), the softmax scale by m(mscale_all_dim)²,
    with m(s) = 0.1 s ln(factor) + 1. A zero for both means that cos and sin are multiplied by m(1).
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"yarn.factor is {self.factor}, must be at least 1")
        if self.original_max_position < 1:
            raise ValueError(f"yarn.original_max_position is {self.original_max_position}, must be at least 1")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"yarn.beta_fast {self.beta_fast} must be greater than beta_slow {self.beta_slow}")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's context extension (Grattafiori et al., arXiv:2407.21783 §3.4.2; the formula is in Meta's released
    code).

    A frequency that turns more than `high_freq_factor` times over the original context is kept, one that turns less
    than `low_freq_factor` times is divided by `factor`, those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"llama3.factor is {self.factor}, must be at least 1")
        if self.original_max_position < 1:
            raise ValueError(f"llama3.original_max_position is {self.original_max_position}, must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"llama3.low_freq_factor {self.low_freq_factor} must be positive and less than high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model. `kv_lora_rank` chooses the attention: None is MHA/GQA/MQA, a number is MLA.

    MHA/GQA reads num_heads, num_kv_heads, head_dim, qk_norm (RMSNorm on each head of q and k, as Qwen3), qkv_bias
    (Qwen2), o_bias, and sliding_window: a query sees that many keys, itself included, in the layers from
    `full_attention_layers` on.
    MLA (DeepSeek-V2, arXiv:2405.04434 §2.1) reads num_heads, q_lora_rank (None: one full query projection),
    kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
    Layers before `first_k_dense` have a dense SwiGLU of `intermediate_size`, the others routed experts of
    `moe_intermediate_size` and, if num_shared_experts > 0, one shared SwiGLU of num_shared_experts times that.
    `scoring="sigmoid"` adds a selection bias that does not enter the weights (DeepSeek-V3, arXiv:2412.19437 §2.1.2).
    Groups: only experts in the best `topk_group` of `n_group` groups can be chosen.
    Without experts (num_experts, top_k and moe_intermediate_size 0) all layers are dense (Llama, Qwen2).
    Rotary frequencies are scaled by at most one of yarn, llama3 and rope_factor (positions are divided by it,
    arXiv:2306.15595).
    Raises ValueError, naming the field, when sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_experts: int = 0
    top_k: int = 0
    moe_intermediate_size: int = 0
    intermediate_size: int = 0
    first_k_dense: int = 0
    num_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_kv_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    full_attention_layers: int = 0
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    rope_factor: float = 1.0
    yarn: Yarn | None = None
    llama3: Llama3Rope | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0
    max_position: int = 4096

    @property
    def is_mla(self) -> bool:
        """True for multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def rope_dim(self) -> int:
        """Number of rotated values per head."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.v_head_dim if self.is_mla else self.head_dim

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "n_group", "topk_group", "max_position"):
            self._at_least(name, 1)
        for name in ("num_experts", "first_k_dense", "num_shared_experts", "num_mtp_layers", "full_attention_layers"):
            self._at_least(name, 0)
        if self.first_k_dense > 0:
            self._at_least("intermediate_size", 1)
        self._require(self.first_k_dense <= self.num_layers, "first_k_dense", f"at most num_layers {self.num_layers}")
        self._require(self.scoring in ("softmax", "sigmoid"), "scoring", "'softmax' or 'sigmoid'")
        self._require(self.rms_norm_eps > 0, "rms_norm_eps", "positive")
        self._check_rope()
        if self.num_experts:
            self._check_routing()
        else:
            self._check_dense()
        if self.is_mla:
            self._check_mla()
        else:
            self._check_gqa()

    def _check_rope(self) -> None:
        self._require(self.rope_theta > 1, "rope_theta", "greater than 1")
        self._require(self.rope_factor >= 1, "rope_factor", "at least 1")
        scaled = [name for name in ("yarn", "llama3") if getattr(self, name) is not None]
        scaled += ["rope_factor"] if self.rope_factor != 1 else []
        if len(scaled) > 1:
            raise ValueError(f"{' and '.join(scaled)} exclude each other")

    def _check_dense(self) -> None:
        for name in ("top_k", "moe_intermediate_size", "num_shared_experts", "num_mtp_layers"):
            self._require(getattr(self, name) == 0, name, "0 without experts (num_experts is 0)")
        self._require(
            self.first_k_dense == self.num_layers, "first_k_dense", f"num_layers {self.num_layers} without experts"
        )

    def _check_routing(self) -> None:
        for name in ("top_k", "moe_intermediate_size"):
            self._at_least(name, 1)
        self._require(self.top_k <= self.num_experts, "top_k", f"at most num_experts {self.num_experts}")
        self._require(self.num_experts % self.n_group == 0, "n_group", f"a divisor of num_experts {self.num_experts}")
        self._require(self.topk_group <= self.n_group, "topk_group", f"at most n_group {self.n_group}")
        per_group = self.num_experts // self.n_group
        self._require(
            self.top_k <= self.topk_group * per_group, "top_k", f"at most {self.topk_group} groups of {per_group}"
        )
        if self.scoring == "sigmoid" and self.n_group > 1:
            self._require(per_group >= 2, "n_group", "such that a group has 2 experts (its score sums its best two)")

    def _check_mla(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            self._at_least(name, 1)
        if self.q_lora_rank is not None:
            self._at_least("q_lora_rank", 1)
        self._require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even")
        for name in ("num_kv_heads", "head_dim"):
            self._require(getattr(self, name) == 0, name, "0 with MLA (kv_lora_rank is set)")
        for name in ("qk_norm", "qkv_bias", "o_bias"):
            self._require(not getattr(self, name), name, "False with MLA")
        self._require(self.sliding_window is None, "sliding_window", "None with MLA")

    def _check_gqa(self) -> None:
        self._at_least("num_kv_heads", 1)
        self._at_least("head_dim", 1)
        self._require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"a divisor of {self.num_heads} heads")
        self._require(self.head_dim % 2 == 0, "head_dim", "even")
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            self._require(getattr(self, name) == 0, name, "0 without MLA (kv_lora_rank is None)")
        self._require(self.q_lora_rank is None, "q_lora_rank", "None without MLA")
        if self.sliding_window is not None:
            self._at_least("sliding_window", 1)
            self._require(self.num_mtp_layers == 0, "num_mtp_layers", "0 with a sliding window")

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer's attention has the sliding window."""
        return self.sliding_window is not None and layer >= self.full_attention_layers

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}, must be an int")
        self._require(value >= low, name, f"at least {low}")

    def _require(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise ValueError(f"{name} is {getattr(self, name)!r}, must be {wanted}")

    def to_json(self) -> str:
        """The config as indented JSON, readable by `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads `to_json`'s text. Raises ValueError on bad JSON, unknown, missing or unfitting fields."""
        fields: Any = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a config is a JSON object, got {type(fields).__name__}")
        return cls.from_fields(fields)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From plain values; `yarn` and `llama3` are mappings of their own fields. Raises ValueError as `from_json`."""
        unknown = fields.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown config fields: {sorted(unknown)}")
        try:
            scalings = {"yarn": Yarn, "llama3": Llama3Rope}
            nested = {n: kind(**fields[n]) for n, kind in scalings.items() if fields.get(n) is not None}
            return cls(**{**fields, **nested})
        except TypeError as error:
            raise ValueError(f"bad config: {error}") from error
