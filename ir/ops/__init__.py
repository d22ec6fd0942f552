"""The op families. Importing this package declares every op."""

from moec.ir.ops import attention, call, elementwise, extern_aten, linear, moe, norm, quant, reduction, rope, tensor

__all__ = [
    "attention", "call", "elementwise", "extern_aten", "linear", "moe", "norm", "quant", "reduction", "rope", "tensor",
]  # fmt: skip
