"""`quant`: values and weights as codes with a scale per block, see `block_codes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from moec.ir.errors import CompileError, require
from moec.ir.opdef import Attr, Operand, OptionalOperand, op
from moec.ir.ops.block_codes import CODES, dequantize_blocks, quantize_blocks, scale_type
from moec.ir.ops.elementwise import check_limit
from moec.ir.ops.moe import (
    ACTIVATIONS,
    activate,
    check_expert_biases,
    check_expert_shapes,
    check_routing,
    combine_experts,
    swiglu_clamped,
)
from moec.ir.ops.overflow import overflows
from moec.ir.types import DType, TensorType
from moec.ir.weight import CheckedSource

if TYPE_CHECKING:
    from moec.ir.graph import Graph


def require_finite(name: str, tensor: torch.Tensor, *, block: tuple[int, int] | None = None, hint: str) -> None:
    """Raise CompileError (code "weight") on NaN or infinity in a weight [..., R, C], or in its scales (no `block`),
    which names the weight and the first place: expert, row, column and block."""
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if not count:
        return
    *expert, row, column = (int(i) for i in torch.unravel_index(bad.flatten().to(torch.uint8).argmax(), bad.shape))
    place = [f"expert {expert[-1]}"] if expert else []
    if block is not None:
        place.append(f"row {row}, column {column}")
        row, column = row // block[0], column // block[1]
    place.append(f"block [{row}, {column}]")
    value = tensor[*expert, row, column] if block is None else tensor[bad][0]
    raise CompileError(
        f"weight {name!r} has {count} NaN or infinite {'scale' if block is None else 'element'}{'s' * (count > 1)}: "
        f"{float(value)} in {', '.join(place)}; expected finite numbers",
        code="weight",
        hint=hint,
    )


def check_scales(graph: Graph) -> None:
    """Make every stored scale of the graph's `quant` ops be checked when it is read: NaN and infinity are refused."""
    for node in graph.nodes:
        for name, _ in node.opdef.operands if node.op.startswith("quant.") else ():
            value = node.operand(name) if name.endswith("scale") else None
            weight = None if value is None else value.weight
            if value is None or weight is None or weight.source is None or isinstance(weight.source, CheckedSource):
                continue
            value.weight = replace(weight, source=CheckedSource(weight.source, _scale_check(weight.name)))


def _scale_check(name: str) -> Callable[[torch.Tensor], None]:
    hint = "the weight was quantised wrongly, or its file is damaged"
    return lambda tensor: require_finite(name, tensor, hint=hint)


@op("quant.quantize", results=2)
class Quantize:
    """Block-scaled E4M3: x [..., R, C] → codes f8e4m3fn[..., R, C], scales f32[..., ⌈R/rows⌉, ⌈C/columns⌉].

    scale = amax/448 over blocks of `block` = (rows, columns), 1 where that is zero; codes round
    to nearest even and saturate. A block of (1, 128) gives scales per token that do not depend on the
    batch.
    """

    x: Operand
    block: Attr[tuple[int, int]]

    def infer(self) -> tuple[TensorType, ...]:
        require(self.x.rank >= 2 and self.x.dtype.is_float, f"takes floats of rank ≥ 2, got {self.x}")
        check_block(self.block)
        codes = self.x.with_dtype(DType.F8E4M3)
        return codes, scale_type(codes, self.block)

    def reference(self) -> tuple[torch.Tensor, ...]:
        return quantize_blocks(self.x, self.block)

    @staticmethod
    def samples(r: Any) -> Any:
        yield [r.floats(r.n, 2 * r.k)], {"block": (1, 4)}
        yield [r.floats(2, r.n, r.k, dtype="bf16")], {"block": (1, 128)}
        yield [r.floats(r.k, r.m)], {"block": (4, 2)}
        yield [torch.zeros(r.n, r.k)], {"block": (1, 4)}


def check_codes(*codes: TensorType) -> None:
    """All of one of the dtypes that weights may be stored as."""
    found = {c.dtype for c in codes}
    shown = " and ".join(dict.fromkeys(c.dtype for c in codes))
    require(len(found) == 1 and found <= set(CODES), f"codes are {shown}, expected one of {', '.join(CODES)}")


def check_block(block: tuple[int, ...]) -> None:
    ok = len(block) == 2 and all(isinstance(b, int) and b >= 1 for b in block)
    require(ok, f"block {block} must be two positive ints")


@op("quant.dequantize")
class Dequantize:
    """codes [..., R, C] (f8e4m3fn, i8 or i4) · their block's scale, as `dtype`."""

    codes: Operand
    scale: Operand
    block: Attr[tuple[int, int]]
    dtype: Attr[DType] = DType.F32

    def infer(self) -> TensorType:
        check_block(self.block)
        check_codes(self.codes)
        require(self.codes.rank >= 2, f"codes {self.codes} must have rank 2 at least")
        want = scale_type(self.codes, self.block)
        require(self.scale == want, f"scale {self.scale}, expected {want}")
        require(self.dtype.is_wide_float, f"dtype {self.dtype}")
        return self.codes.with_dtype(self.dtype)

    def reference(self) -> torch.Tensor:
        return dequantize_blocks(self.codes, self.scale, self.block).to(self.dtype.torch)

    @staticmethod
    def samples(r: Any) -> Any:
        for dtype in CODES:
            for block in ((1, 4), (4, 2)):
                codes, scale = quantize_blocks(r.floats(r.n, r.k), block, dtype)
                yield [codes, scale], {"block": block}
        yield [codes, scale], {"block": (4, 2), "dtype": "bf16"}


@op("quant.scaled_linear")
class ScaledLinear:
    """y = dequant(x) @ dequant(weight)ᵀ (+ bias): x codes [..., M, K] with scales per (1, group), weight
    codes [N, K] with scales per `block`; products are accumulated in f32 → `dtype` [..., M, N].

    Products of E4M3 codes are exact in f32, so lowerings may scale per K-block or per element; they differ
    in the order of additions only.
    """

    x: Operand
    x_scale: Operand
    weight: Operand
    weight_scale: Operand
    bias: OptionalOperand
    block: Attr[tuple[int, int]] = (128, 128)
    group: Attr[int] = 128
    dtype: Attr[DType] = DType.F32

    def infer(self) -> TensorType:
        x, w = self.x, self.weight
        check_block(self.block)
        require(self.dtype.is_wide_float, f"dtype {self.dtype}")
        require(x.dtype is DType.F8E4M3 and w.dtype is DType.F8E4M3, f"codes are {x.dtype} and {w.dtype}")
        require(w.rank == 2 and x.rank >= 2 and x.shape[-1] == w.shape[1], f"x {x}, weight {w}")
        for what, got, want in (
            ("x_scale", self.x_scale, scale_type(x, (1, self.group))),
            ("weight_scale", self.weight_scale, scale_type(w, self.block)),
        ):
            require(got == want, f"{what} {got}, expected {want}")
        require(self.bias is None or self.bias == TensorType(self.dtype, w.shape[:1]), f"bias {self.bias}")
        return TensorType(self.dtype, (*x.shape[:-1], w.shape[0]))

    def reference(self) -> torch.Tensor:
        x = dequantize_blocks(self.x, self.x_scale, (1, self.group))
        w = dequantize_blocks(self.weight, self.weight_scale, self.block)
        y = F.linear(x, w).to(self.dtype.torch)
        return y if self.bias is None else y + self.bias

    def decompose(self, b: Any) -> Any:
        x = b.dequantize(self.x, self.x_scale, block=(1, self.group))
        w = b.dequantize(self.weight, self.weight_scale, block=self.block)
        y = b.op("linear.linear", [x, w])
        y = y if self.dtype is DType.F32 else b.cast(y, dtype=self.dtype)
        return y if self.bias is None else b.add(y, self.bias)

    def undefined(self) -> bool:
        return overflows(self.x_scale, self.weight_scale, self.bias)

    @staticmethod
    def samples(r: Any) -> Any:
        x, xs = quantize_blocks(r.floats(r.n, r.k), (1, 4))
        w, ws = quantize_blocks(r.floats(r.m, r.k), (2, 4))
        yield [x, xs, w, ws], {"block": (2, 4), "group": 4}
        yield [x, xs, w, ws, r.floats(r.m)], {"block": (2, 4), "group": 4}


@op("quant.scaled_experts")
class ScaledExperts:
    """`moe.experts` on stored weights: codes (f8e4m3fn, i8 or i4) [E, 2f, d] and [E, d, f] with f32 scales per `block`
    of each expert's matrix, gate rows first, and optional biases [E, 2f] and [E, d] in the dtype of x. x [T, d] is
    f32/bf16; with `group` (E4M3 only) the rows going into each of the two products are quantised per (1, group) first
    (W8A8), with group=None they stay (weight-only). Products accumulate in f32; the result has the dtype of x."""

    x: Operand
    weights: Operand
    experts: Operand
    gate_up: Operand
    gate_up_scale: Operand
    down: Operand
    down_scale: Operand
    gate_up_bias: OptionalOperand
    down_bias: OptionalOperand
    block: Attr[tuple[int, int]] = (128, 128)
    group: Attr[int | None] = 128
    activation: Attr[str] = "silu"
    limit: Attr[float | None] = None
    alpha: Attr[float] = 1.702
    up_offset: Attr[float] = 1.0

    def infer(self) -> TensorType:
        x, gu, dn = self.x, self.gate_up, self.down
        check_block(self.block)
        require(x.rank == 2 and x.dtype.is_wide_float, f"x {x} must be floats of rank 2")
        check_routing(x, self.weights, self.experts)
        require(gu.rank == 3 and dn.rank == 3, f"gate_up {gu} and down {dn} must have rank 3")
        check_codes(gu, dn)
        check_expert_shapes(x, gu.shape, dn.shape)
        for what, got, codes in (("gate_up", self.gate_up_scale, gu), ("down", self.down_scale, dn)):
            want = scale_type(codes, self.block)
            require(got == want, f"{what}_scale {got}, expected {want}")
        check_expert_biases(x, gu.shape, self.gate_up_bias, self.down_bias)
        check_limit(self.limit)
        require(self.group is None or (isinstance(self.group, int) and self.group > 0), f"group {self.group!r}")
        both = gu.dtype is DType.F8E4M3 or self.group is None
        require(both, f"weights are {gu.dtype}, activations can be quantised (group={self.group}) beside f8e4m3fn only")
        require(self.activation in ACTIVATIONS, f"activation {self.activation!r} is none of {ACTIVATIONS}")
        return x

    def reference(self) -> torch.Tensor:
        def rounded(rows: torch.Tensor) -> torch.Tensor:
            if self.group is None:
                return rows.to(torch.float32)
            block = (1, self.group)
            return dequantize_blocks(*quantize_blocks(rows, block), block)

        def mlp(e: int, rows: torch.Tensor) -> torch.Tensor:
            gate_up = dequantize_blocks(self.gate_up[e], self.gate_up_scale[e], self.block)
            down = dequantize_blocks(self.down[e], self.down_scale[e], self.block)
            biases = [None if b is None else b[e].to(torch.float32) for b in (self.gate_up_bias, self.down_bias)]
            gate, up = F.linear(rounded(rows), gate_up, biases[0]).chunk(2, dim=-1)
            if self.limit is None:
                h = activate(gate, up, self.activation)
            else:
                h = swiglu_clamped(gate, up, self.limit, self.alpha, self.up_offset)
            return F.linear(rounded(h), down, biases[1]).to(self.x.dtype)

        return combine_experts(self.x, self.weights, self.experts, self.gate_up.shape[0], mlp)

    def decompose(self, b: Any) -> Any:
        """Weight-only: dequantise and run the experts in the dtype of x."""
        require(self.group is None, "quant.scaled_experts with activations in FP8 has no decomposition")
        weights = [
            b.dequantize(codes, scale, block=self.block, dtype=self.x.dtype)
            for codes, scale in ((self.gate_up, self.gate_up_scale), (self.down, self.down_scale))
        ]
        attrs = {n: getattr(self, n) for n in ("activation", "limit", "alpha", "up_offset")}
        operands = [self.x, self.weights, self.experts, *weights, self.gate_up_bias, self.down_bias]
        return b.op("moe.experts", operands, attrs)

    def undefined(self) -> bool:
        return overflows(self.x, self.weights, self.gate_up_scale, self.down_scale, self.gate_up_bias, self.down_bias)

    @staticmethod
    def samples(r: Any) -> Any:
        d, f, e, k = r.k, r.m, 5, 2
        x, w, idx = r.floats(r.n, d), r.floats(r.n, k, positive=True), r.ints(0, e, r.n, k)
        gu, dn = quantize_blocks(r.floats(e, 2 * f, d), (2, 4)), quantize_blocks(r.floats(e, d, f), (2, 4))
        for group in (4, None):
            yield [x, w, idx, *gu, *dn], {"block": (2, 4), "group": group}
            biases = r.floats(e, 2 * f), r.floats(e, d)
            yield [x, w, idx, *gu, *dn, *biases], {"block": (2, 4), "group": group, "limit": 7.0}
        yield [x, w, idx, *gu, *dn, None, biases[1]], {"block": (2, 4), "group": None, "activation": "relu"}
        for dtype in (DType.I8, DType.I4):
            stored = [*quantize_blocks(r.floats(e, 2 * f, d), (1, 4), dtype)]
            stored += quantize_blocks(r.floats(e, d, f), (1, 4), dtype)
            yield [x, w, idx, *stored], {"block": (1, 4), "group": None}
            yield [x, w, idx, *stored, *biases], {"block": (1, 4), "group": None, "limit": 7.0}
