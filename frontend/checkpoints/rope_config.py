"""Rotary embedding as config.json says it, in the form of transformers 5 (rope_parameters) and the older ones
(rope_theta, rope_scaling)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moec.frontend.checkpoints.numbers import LARGEST, finite

if TYPE_CHECKING:
    from moec.frontend.checkpoints.hf_config import Reading

THETA = {"mixtral": 1e6}  # what a config without one means; others 10000

_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "truncate",
    },
}  # fmt: skip


def read_rope(r: Reading) -> dict[str, Any]:
    """rope_theta, and one of yarn, llama3, rope_factor where the frequencies are scaled."""
    parameters = r.value("rope_parameters")
    scaling = r.value("rope_scaling")
    theta = r.value("rope_theta")
    said = parameters if parameters is not None else scaling if scaling is not None else {}
    what = "rope_parameters" if parameters is not None else "rope_scaling"
    if not isinstance(said, dict):
        r.problems.add(f"config.json: {what} is {said!r}, expected an object")
        said = {}
    said = dict(said)
    if parameters is not None and scaling is not None and scaling != parameters:
        r.problems.add(
            f"config.json: rope_scaling {scaling!r} and rope_parameters {parameters!r} contradict each other"
        )
    theta = said.pop("rope_theta", theta)
    theta = THETA.get(r.data.get("model_type", ""), 10000.0) if theta is None else theta
    base = finite(theta)
    if base is None or base <= 1:
        r.problems.add(f"config.json: rope_theta is {theta!r}, expected a number greater than 1")
        base = 10000.0
    fields: dict[str, Any] = {"rope_theta": base}
    old = said.pop("type", None)
    kind = said.pop("rope_type", old) or "default"
    partial = said.pop("partial_rotary_factor", r.value("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        r.problems.add(f"config.json: partial_rotary_factor is {partial!r}, supported is 1.0")
    if not isinstance(kind, str) or kind not in _KNOWN:
        r.problems.add(f"config.json: {what}.rope_type is {kind!r}, supported are {', '.join(_KNOWN)}")
        return fields
    for name in sorted(said.keys() - _KNOWN[kind]):
        r.problems.add(f"config.json: {what}.{name} is {said[name]!r}, a field that {kind} does not have")
    return fields | _Scaling(r, what, said).read(kind)


class _Scaling:
    def __init__(self, r: Reading, what: str, said: dict[str, Any]):
        self.r, self.what, self.said = r, what, said

    def read(self, kind: str) -> dict[str, Any]:
        if kind == "linear":
            return {"rope_factor": self.number("factor", least=1)}
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            return {"llama3": {n: self.number(n) for n in names} | {"original_max_position": self.original()}}
        return self.yarn() if kind == "yarn" else {}

    def yarn(self) -> dict[str, Any]:
        original = self.original()
        if self.said.get("factor") is None:  # as DeepSeek's configs may leave it
            factor = self.r.integer("max_position_embeddings") / original
        else:
            factor = self.number("factor", least=1)
        fields = {
            "factor": factor,
            "original_max_position": original,
            "beta_fast": self.number("beta_fast", 32.0),
            "beta_slow": self.number("beta_slow", 1.0),
            "mscale": self.number("mscale", 0.0),
            "mscale_all_dim": self.number("mscale_all_dim", 0.0),
        }
        if self.said.get("truncate", True) is not True:
            self.bad("truncate", "true")
        given = self.said.get("attention_factor")
        if given is not None and given != self.attention_factor(fields):
            self.bad("attention_factor", f"{self.attention_factor(fields)}, what the other fields give")
        return {"yarn": fields}

    @staticmethod
    def attention_factor(yarn: dict[str, Any]) -> float:
        """What cos and sin are multiplied by (YaRN, arXiv:2309.00071 §3.4, with DeepSeek's two mscale values)."""

        def m(s: float) -> float:
            return 0.1 * s * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0

        both = yarn["mscale"] and yarn["mscale_all_dim"]
        return m(yarn["mscale"]) / m(yarn["mscale_all_dim"]) if both else m(1.0)

    def original(self) -> int:
        value = self.said.get("original_max_position_embeddings")
        if value is None:
            value = self.r.integer("max_position_embeddings")
        if type(value) is not int or not 1 <= value <= LARGEST:
            self.bad("original_max_position_embeddings", "a positive whole number")
            return 1
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        value = self.said.get(name)
        number = finite(default if value is None else value)
        if number is None or number < least:
            self.bad(name, f"a number of at least {least:g}")
            return 1.0
        return number

    def bad(self, name: str, expected: str) -> None:
        self.r.problems.add(f"config.json: {self.what}.{name} is {self.said.get(name)!r}, expected {expected}")
