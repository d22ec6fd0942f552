"""`quantization_config` of config.json: DeepSeek's block FP8, and refusals of everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moec.frontend.checkpoints.errors import Problems

_LEFT = ("modules_to_not_convert", "ignored_layers")
_FIELDS = {
    "quant_method", "weight_block_size", "fmt", "scale_fmt", "activation_scheme", "dequantize", *_LEFT,
}  # fmt: skip


@dataclass(frozen=True)
class BlockFP8:
    """Weights as E4M3 codes with one scale per `block` of rows × columns, beside each weight as `…weight_scale_inv`
    (which it is multiplied by); activations are quantised as they come, per token in groups of block columns. `keep`:
    modules that are not converted."""

    block: tuple[int, int]
    keep: tuple[str, ...] = ()


def read_quantization(data: Mapping[str, Any], problems: Problems) -> BlockFP8 | None:
    """None where the config has none. Layers that are not quantised are known by their stored dtype."""
    said = data.get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, dict) or said.get("quant_method") != "fp8":
        method = said.get("quant_method") if isinstance(said, dict) else said
        problems.add(
            f"config.json: quantization_config.quant_method is {method!r}, supported is 'fp8' with weight_block_size"
        )
        return None

    def bad(name: str, expected: str) -> None:
        problems.add(f"config.json: quantization_config.{name} is {said.get(name)!r}, expected {expected}")

    block = said.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(b) is not int or b < 1 for b in block):
        bad("weight_block_size", "two positive whole numbers, as [128, 128]")
        block = [128, 128]
    for name, allowed in (
        ("fmt", (None, "e4m3", "float8_e4m3fn")),
        ("scale_fmt", (None, "ue8m0", "float")),
        ("activation_scheme", (None, "dynamic")),
    ):
        if said.get(name) not in allowed:
            bad(name, " or ".join(repr(a) for a in allowed if a is not None))
    for name in sorted(said.keys() - _FIELDS):
        problems.add(f"config.json: quantization_config.{name} is {said[name]!r}, a field that is not supported")
    keep: list[str] = []
    for name in _LEFT:
        modules = said.get(name) or []
        if isinstance(modules, list) and all(isinstance(m, str) for m in modules):
            keep += modules
        else:
            bad(name, "a list of module names")
    return BlockFP8((block[0], block[1]), tuple(keep))
