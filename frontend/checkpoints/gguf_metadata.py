"""The metadata of a GGUF file → the fields of our own model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moec.frontend.checkpoints.errors import Problems
from moec.frontend.checkpoints.numbers import LARGEST, finite

ARCHITECTURES = ("llama", "qwen2", "qwen3moe")
_TOKENS = {"eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id", "bos_token_id": "bos_token_id"}


@dataclass
class Metadata:
    """Fields by name, with every complaint kept, and what was not read."""

    data: Mapping[str, Any]
    problems: Problems
    architecture: str = ""
    _used: set[str] = field(default_factory=set)

    def value(self, name: str, default: Any = None) -> Any:
        name = f"{self.architecture}.{name}"
        self._used.add(name)
        return self.data.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.value(name, default)
        if type(value) is not int or not 1 <= value <= LARGEST:
            self.problems.add(f"{self.architecture}.{name} is {value!r}, expected a whole number from 1 to {LARGEST}")
            return 1
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.value(name, default)
        number = finite(value)
        if number is None:
            self.problems.add(f"{self.architecture}.{name} is {value!r}, expected a number")
            return default or 1.0
        return number

    def must_be(self, name: str, *allowed: Any) -> None:
        if (value := self.value(name, allowed[0])) not in allowed:
            self.problems.add(
                f"{self.architecture}.{name} is {value!r}, which is not supported (supported: {allowed[0]!r})"
            )

    def finish(self) -> None:
        """Refuse what nothing has read: it could change what is computed."""
        for name in sorted(self.data.keys() - self._used):
            if name.startswith(f"{self.architecture}."):
                self.problems.add(f"{name} is {self.data[name]!r}, a field that is not supported")


def read_metadata(m: Metadata, rows: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of `moec.models.ModelConfig`, special tokens). `rows`: those of the embedding."""
    kind = m.data.get("general.architecture")
    if kind not in ARCHITECTURES:
        m.problems.add(f"general.architecture is {kind!r}, supported are {', '.join(ARCHITECTURES)}")
        m.problems.stop()
    m.architecture = kind
    hidden, heads = m.integer("embedding_length"), m.integer("attention.head_count")
    head_dim = m.integer("attention.key_length", max(hidden // heads, 1))
    m.must_be("attention.value_length", head_dim)
    m.must_be("rope.dimension_count", head_dim)
    fields: dict[str, Any] = {
        "vocab_size": rows or m.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": m.integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": m.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": m.integer("feed_forward_length", 1),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": m.number("rope.freq_base", 10000.0),
        "max_position": m.integer("context_length"),
        # rows of queries and keys are stored in pairs
        "rope_interleaved": kind == "llama",
        **_scaling(m),
    }
    m.must_be("vocab_size", fields["vocab_size"])
    if kind == "qwen3moe":
        fields |= {
            "qk_norm": True,
            "num_experts": m.integer("expert_count"),
            "top_k": m.integer("expert_used_count"),
            "moe_intermediate_size": m.integer("expert_feed_forward_length"),
            "norm_topk_prob": True,  # llama.cpp always divides by the sum for this architecture
        }
        m.must_be("expert_weights_norm", True)
    else:
        m.must_be("expert_count", 0)
        m.must_be("expert_used_count", 0)
        fields["first_k_dense"] = fields["num_layers"]
    m.finish()
    tokens = {ours: m.data.get(f"tokenizer.ggml.{theirs}") for ours, theirs in _TOKENS.items()}
    return fields, {k: v for k, v in tokens.items() if type(v) is int and v >= 0}


def _scaling(m: Metadata) -> dict[str, Any]:
    kind = m.value("rope.scaling.type", "none")
    factor = m.number("rope.scaling.factor", 1.0)
    original = m.value("rope.scaling.original_context_length")
    m.value("rope.scaling.finetuned")
    if kind == "linear":
        return {"rope_factor": factor}
    if kind == "yarn":
        name = "context_length" if original is None else "rope.scaling.original_context_length"
        return {"yarn": {"factor": factor, "original_max_position": m.integer(name)}}
    if kind != "none":
        m.problems.add(f"{m.architecture}.rope.scaling.type is {kind!r}, supported are none, linear, yarn")
    return {}
