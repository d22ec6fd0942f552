"""com.microsoft's experts, and products with weights of few bits. Those come in as the floats that they stand for,
computed when a backend reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moec.frontend.onnx.context import ImportContext
from moec.frontend.onnx.registry import MICROSOFT, imports
from moec.ir import DType, TensorType, Value
from moec.ir.arrays import from_numpy
from moec.ir.dims import product

_NO_LIMIT = float(torch.finfo(torch.float32).max)


@imports("MoE", domain=MICROSOFT)
def moe(c: ImportContext, x: Value, logits: Value, fc1: Value, bias1: Value | None, fc2: Value,
        bias2: Value | None = None, fc3: Value | None = None, bias3: Value | None = None, *,
        activation_alpha: float | None, activation_beta: float | None, activation_type: str | None, k: int | None,
        normalize_routing_weights: int | None, swiglu_fusion: int | None, swiglu_limit: float | None,
        use_sparse_mixer: int | None) -> Value:  # fmt: skip
    """x [T, d] or [B, S, d], logits [T, E], fc1 [E, f or 2f, d], fc2 [E, d, f], fc3 [E, f, d]."""
    if use_sparse_mixer:
        raise c.refuse("use_sparse_mixer")
    weights, experts = _routed(c, logits, None, k or 1, bool(normalize_routing_weights))
    unit = _unit(c, activation_type or "relu", swiglu_fusion or 0, fc3 is not None, activation_alpha, activation_beta,
                 swiglu_limit)  # fmt: skip
    return _experts(c, x, weights, experts, (fc1, fc2, fc3), (bias1, bias2, bias3), unit)


@imports("QMoE", domain=MICROSOFT)
def qmoe(c: ImportContext, x: Value, logits: Value, fc1: Value, scale1: Value, bias1: Value | None, fc2: Value,
         scale2: Value, bias2: Value | None = None, fc3: Value | None = None, scale3: Value | None = None,
         bias3: Value | None = None, zero1: Value | None = None, zero2: Value | None = None, zero3: Value | None = None,
         router_weights: Value | None = None, *, accuracy_level: int | None, activation_alpha: float | None,
         activation_beta: float | None, activation_type: str | None, block_size: int | None,
         expert_weight_bits: int | None, k: int | None, normalize_routing_weights: int | None, quant_type: str | None,
         swiglu_fusion: int | None, swiglu_limit: float | None, use_sparse_mixer: int | None,
         weights_prepacked: int | None) -> Value:  # fmt: skip
    """As MoE, with weights of 2, 4 or 8 bits: rows [K · bits / 8] of bytes, a scale for each row or for `block_size`
    elements of it."""
    if weights_prepacked == 1:
        raise c.refuse("weights in the order of some device's kernels")
    if use_sparse_mixer or quant_type not in (None, "int"):
        raise c.refuse("use_sparse_mixer" if use_sparse_mixer else f"quant_type {quant_type!r}")
    bits = expert_weight_bits or 4
    weights, experts = _routed(c, logits, router_weights, k or 1, bool(normalize_routing_weights))
    unit = _unit(c, activation_type or "relu", swiglu_fusion or 0, fc3 is not None, activation_alpha, activation_beta,
                 swiglu_limit)  # fmt: skip
    wide = [None if q is None or s is None else _dequantised(c, q, s, z, bits, block_size or 0)
            for q, s, z in ((fc1, scale1, zero1), (fc2, scale2, zero2), (fc3, scale3, zero3))]  # fmt: skip
    return _experts(c, x, weights, experts, wide, (bias1, bias2, bias3), unit)


def _routed(c: ImportContext, logits: Value, values: Value | None, k: int, normalize: bool) -> tuple[Value, Value]:
    """Weights [T, k] and experts i64[T, k]: softmax over all experts, or chosen by `logits` and weighed by `values`."""
    if values is None:
        weights, experts = c.b.route(logits, None, k=k, normalize=normalize)
        return weights, experts
    _, experts = c.b.topk(logits, k=k, axis=-1)
    weights = c.b.gather_elements(values, experts, axis=-1)
    if normalize:
        weights = c.b.div(weights, c.b.sum(weights, axes=(-1,), keepdim=True))
    return weights, experts


def _unit(c: ImportContext, kind: str, fusion: int, separate: bool, alpha: float | None, beta: float | None,
          limit: float | None) -> dict[str, Any]:  # fmt: skip
    """The attributes of `moe.experts` for a gated unit. Raises CompileError for one without a gate."""
    alpha, beta = 1.0 if alpha is None else alpha, beta or 0.0
    if kind == "swiglu" and (fusion in (1, 2)) != separate:
        plain = alpha == 1.0 and beta == 0.0 and limit is None
        clamped = {"limit": _NO_LIMIT if limit is None else limit, "alpha": alpha, "up_offset": beta}
        return {"interleaved": fusion == 1, **({} if plain else clamped)}
    if kind in ("silu", "relu", "gelu") and separate and not fusion:
        return {"activation": kind}
    raise c.refuse(f"activation {kind!r}, swiglu_fusion {fusion}, {'with' if separate else 'without'} fc3")


def _experts(c: ImportContext, x: Value, weights: Value, experts: Value, matrices: Any, biases: Any,
             unit: dict[str, Any]) -> Value:  # fmt: skip
    (fc1, fc2, fc3), (bias1, bias2, bias3) = matrices, biases
    if fc3 is not None:
        if (bias1 is None) != (bias3 is None):
            raise c.refuse("a bias of one of gate and up")
        bias1 = None if bias1 is None else c.concat([bias1, bias3], 1)
        fc1 = _joined(c, fc1, fc3)
    c.floats(x, fc1, fc2, bias1, bias2)
    rows = c.reshape(x, (product(x.shape[:-1]), x.shape[-1]))
    y = c.b.moe_experts(rows, weights, experts, fc1, fc2, bias1, bias2, **unit)
    return c.reshape(y, x.shape)


def _joined(c: ImportContext, gate: Value, up: Value) -> Value:
    """[E, 2f, d]: a view of two weights where they are such."""
    if gate.weight is None or up.weight is None:
        return c.concat([gate, up], 1)
    first, second = gate.weight, up.weight
    e, f, d = gate.shape
    if not isinstance(f, int) or up.shape != gate.shape:
        raise c.refuse(f"gate {gate.type} and up {up.type}", code="type")
    name = c.graph.fresh_weight_name(f"{first.name}.joined")
    type = TensorType(gate.dtype, (e, 2 * f, d))
    return c.b.weight(name, lambda: torch.cat([first.load(), second.load()], 1), type)


# -- weights of few bits ---------------------------------------------------------------------------------------------


@imports("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(c: ImportContext, x: Value, codes: Value, scales: Value, zeros: Value | None = None,
                 order: Value | None = None, bias: Value | None = None, *, K: int, N: int, accuracy_level: int | None,
                 bits: int | None, block_size: int) -> Value:  # fmt: skip
    """x [..., K] times the transpose of [N, K], stored as bytes [N, ⌈K / block⌉, block · bits / 8]."""
    if order is not None:
        raise c.refuse("with g_idx")
    c.floats(x, scales, bias)
    bits, blocks = bits or 4, -(-K // block_size)
    read = [_reader(c, v) for v in (codes, scales)]
    zero = None if zeros is None else _reader(c, zeros)

    def compute() -> torch.Tensor:
        q = _unpacked(read[0]().reshape(N, -1), bits)
        s = read[1]().reshape(N, blocks)
        z = _zeros(zero, bits, (N, blocks))
        return _scaled(q, s, z, block_size)[:, :K].contiguous()

    weight = c.b.weight(_name(c, codes), compute, TensorType(scales.dtype, (N, K)))
    return c.b.linear(x, weight, bias)


def _dequantised(c: ImportContext, codes: Value, scales: Value, zeros: Value | None, bits: int, block: int) -> Value:
    """[E, N, K] of bytes [E, N, K · bits / 8]."""
    if bits not in (2, 4, 8) or codes.dtype is not DType.U8 or codes.type.rank != 3:
        raise c.refuse(f"weights {codes.type} of {bits} bits")
    experts, rows, width = (s if isinstance(s, int) else -1 for s in codes.shape)
    read, scale = _reader(c, codes), _reader(c, scales)
    zero = None if zeros is None else _reader(c, zeros)
    shape = tuple(s for s in scales.shape if isinstance(s, int))

    def compute() -> torch.Tensor:
        s = scale()
        return _scaled(_unpacked(read(), bits), s, _zeros(zero, bits, shape), block if s.dim() == 3 else 0)

    type = TensorType(scales.dtype, (experts, rows, width * 8 // bits))
    return c.b.weight(_name(c, codes), compute, type)


def _name(c: ImportContext, codes: Value) -> str:
    return c.graph.fresh_weight_name(f"{codes.weight.name if codes.weight is not None else 'weight'}.float")


def _reader(c: ImportContext, v: Value) -> Callable[[], torch.Tensor]:
    """What gives the elements of a constant. Raises CompileError for anything else."""
    if v.weight is not None:
        return v.weight.load
    array = c.array(v)
    if array is None:
        raise c.refuse("weights that are not constant")
    return lambda: from_numpy(array)


def _unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """u8[..., M] → i32[..., M · 8 / bits], the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    parts = codes.to(torch.int32).unsqueeze(-1) >> shifts
    return (parts & (2**bits - 1)).flatten(-2)


def _zeros(read: Callable[[], torch.Tensor] | None, bits: int, shape: tuple[int, ...]) -> torch.Tensor | int:
    """Zero points of `shape`, packed along the last axis unless they are floats; the middle where there are none."""
    if read is None:
        return 2 ** (bits - 1)
    stored = read()
    if stored.dtype.is_floating_point:
        return stored.reshape(shape)
    return _unpacked(stored.reshape(*shape[:-1], -1), bits)[..., : shape[-1]]


def _scaled(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int, block: int) -> torch.Tensor:
    """(codes − zeros) · scales; those of rows, or of blocks along the last axis."""

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(block, -1)[..., : codes.shape[-1]] if block else t.unsqueeze(-1)

    offset = spread(zeros) if isinstance(zeros, torch.Tensor) else zeros
    return (codes - offset).to(scales.dtype) * spread(scales)
