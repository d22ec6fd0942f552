"""The op families. Importing this package declares every op."""

from moec.ir.ops import attention, call, elementwise, linear, moe, norm, quant, reduction, rope, tensor

__all__ = ["attention", "call", "elementwise", "linear", "moe", "norm", "quant", "reduction", "rope", "tensor"]
